#!/usr/bin/env bash
# Every figure of a GPU that the documents ask for, in under five minutes: scripts/gpu_check.sh [OUTPUT.jsonl]
# One JSON line a figure, written as soon as it is measured, so that a stopped run keeps what it has; tables beside them.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:-runs/gpu_check.jsonl}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python
mkdir -p "$(dirname "$output")"

lines() { # of a benchmark that prints its figures as lines of JSON; ended after the seconds that come first
  timeout "$1" "$python" "${@:2}" | tee >(grep '^{' >>"$output")
}
# A new kernel is compiled at its first launch: the smaller shapes first.
lines 45 scripts/benchmark_capture.py --kernels --runs 5
lines 35 scripts/benchmark_losses.py --device cuda --runs 3
exec "$python" scripts/gpu_check.py --output "$output" --limit 205
