#!/usr/bin/env bash
# Every figure of a GPU that the documents ask for, in under five minutes: scripts/gpu_check.sh [OUTPUT.jsonl]
# One JSON line a figure, written as soon as it is measured, so that a stopped run keeps what it has; then a table.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-runs/gpu_check.jsonl}
mkdir -p "$(dirname "$output")"
exec "${PYTHON:-python}" scripts/gpu_check.py --output "$output" "${@:2}"
