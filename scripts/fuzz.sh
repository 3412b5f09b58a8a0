#!/usr/bin/env bash
# Runs each fuzz target of the project for the given time.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-60s}
targets=$(grep -rn --include='*_test.go' -oE '^func Fuzz[A-Za-z0-9_]+' pkg cmd | sed 's|/[^/]*_test.go:[0-9]*:func |:|')
[ -n "$targets" ] || { echo "there are no fuzz targets" >&2; exit 1; }
for t in $targets; do
	pkg=./${t%%:*} name=${t##*:}
	echo "== $pkg $name"
	CGO_ENABLED=0 go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$pkg"
done
