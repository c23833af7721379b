#!/bin/sh
# Everything that must hold: style, types, and all tests. Arguments go to pytest, e.g. -m "not slow".
set -eu
cd "$(dirname "$0")/.."
EXTRAS="[test]" . scripts/setup.sh
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
