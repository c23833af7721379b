#!/bin/sh
# Everything that must hold: style, types, and all tests. Arguments go to pytest, e.g. -m "not slow".
set -eu
cd "$(dirname "$0")/.."
EXTRAS="[test]" . scripts/setup.sh
ruff check .
ruff format --check .
mypy
# Two at a time: most of a test is waiting for a process of its own. A file stays in one worker, for what its tests share.
python -m pytest -n 2 --dist loadfile "$@"
