"""Measurements and long checks. A regular package, so that no other ``benchmarks`` on the path can come before it."""
