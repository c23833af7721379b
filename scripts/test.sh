#!/bin/sh
# Everything that must hold: style, types, and all tests. Arguments go to pytest, e.g. -m "not slow".
set -eu
cd "$(dirname "$0")/.."
EXTRAS="[test]" . scripts/setup.sh
ruff check .
ruff format --check .
# Types beside the tests, as half a minute for mypy alone would leave a core idle; its words come last, to be seen.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
mypy >"$said" 2>&1 &
types=$!
# Two at a time, for the two cores that CI has; whoever is done takes over from others, and what tests share is made
# once for all.
tests=0
python -m pytest -n 2 --dist worksteal --durations 10 "$@" || tests=$?
wait "$types" || { cat "$said"; exit 1; }
exit "$tests"
