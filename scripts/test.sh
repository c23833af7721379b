#!/bin/sh
# Everything that must hold: style, types, and all tests. Arguments go to pytest, e.g. -m "not slow".
set -eu
cd "$(dirname "$0")/.."
EXTRAS="[test]" . scripts/setup.sh
ruff check .
ruff format --check .
mypy
# Two at a time, and whoever is done takes over from the other; what tests share is made once for both.
python -m pytest -n 2 --dist worksteal --durations 10 "$@"
