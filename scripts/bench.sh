#!/usr/bin/env bash
# Prints one table of what was measured, as ratios to baselines in the same run.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin CGO_ENABLED=0
exec go test -tags bench -count=1 -timeout 60m -run '^TestBench$' -v ./integration/bench
