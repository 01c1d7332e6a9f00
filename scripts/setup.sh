#!/usr/bin/env bash
# Make the virtual environment given as $1 and install the pinned dependencies and blade into it.
# Called by the Makefile; PYTHON names the interpreter to start from.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}

fail() { printf 'set-up stopped: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "no '$python' on the path; install Python 3.11 to 3.13, or name one: make PYTHON=python3.11 ..."
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# blade itself runs on 3.10 too; the pinned diffusers, transformers and numpy don't.
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    fail "'$python' is Python $found, and this set-up needs 3.11 to 3.13; name another one: make PYTHON=python3.11 ..."
compiler=${CXX:-}
for name in ${compiler:-c++ g++ clang++}; do
    if command -v "$name" >/dev/null; then compiler=$name; break; fi
done
[ -n "$compiler" ] && command -v "$compiler" >/dev/null ||
    fail "no C++ compiler (looked for: ${CXX:-c++, g++, clang++}); Inductor and blade's CPU kernels need one. Debian or Ubuntu: apt install g++. macOS: xcode-select --install"

if [ ! -x "$venv/bin/python" ]; then
    echo "set-up: $venv with Python $found"
    "$python" -m venv "$venv" || fail "'$python -m venv' failed; on Debian or Ubuntu: apt install python3-venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
export PIP_CONSTRAINT=$PWD/constraints.txt
# torch alone and first: later requirements then find it in place and never choose another build of it.
echo "set-up: torch (a few minutes where pip has to download it)"
pip install --quiet torch setuptools
echo "set-up: the other dependencies"
pip install --quiet --no-build-isolation --editable '.[dev]'
echo "set-up: done ($("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)'))"
