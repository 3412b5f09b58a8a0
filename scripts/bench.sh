#!/usr/bin/env bash
# Prints one table of what was measured, as ratios to baselines in the same run,
# and keeps the samples: scripts/bench.sh [NAME [PATTERN [TEST]]].
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin CGO_ENABLED=0
export PATCHD_BENCH_OUT=$PWD/bench-results/${1:-last}.txt PATCHD_BENCH_ONLY=${2:-}
exec go test -tags bench -count=1 -timeout 90m -run "^${3:-TestBench}\$" -v ./integration/bench
