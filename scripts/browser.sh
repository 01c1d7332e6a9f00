#!/usr/bin/env bash
# Install what only the look at a report in a browser needs: the package playwright, and a Chromium if there is none.
# Usage: browser.sh BIN_FOLDER_OF_THE_ENVIRONMENT
set -euo pipefail
bin="$1"
"$bin/python" -c "import playwright" 2>/dev/null || "$bin/python" -m pip install --quiet playwright
for name in chromium chromium-browser google-chrome chrome; do
    command -v "$name" >/dev/null && exit 0
done
"$bin/playwright" install --with-deps chromium && exit 0
# Where playwright's own downloads can't be reached, the distribution's Chromium does.
apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium
