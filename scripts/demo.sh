#!/bin/sh
# The main job, end to end: tune a little, build, verify, classify a picture, and compare with PyTorch.
set -eu
cd "$(dirname "$0")/.."
echo "Setting up .venv (a few minutes the first time) ..."
EXTRAS="" . scripts/setup.sh

run() { printf '\n$ saevit-tvm %s\n' "$*"; saevit-tvm "$@"; }

run tune --model saevit_micro --weights digits --trials 96 --minutes 2 --store out/store
run build --model saevit_micro --weights digits --store out/store --out out --name digits
run verify out/digits.so
run run out/digits.so examples/digit-*.png --top 3
run bench out/digits.so --against torch
