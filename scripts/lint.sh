#!/usr/bin/env bash
# gofmt, go vet and staticcheck.
set -euo pipefail
cd "$(dirname "$0")/.."
unformatted=$(gofmt -l cmd pkg integration)
if [ -n "$unformatted" ]; then
	echo "not formatted: $unformatted" >&2
	exit 1
fi
go vet ./...
go vet -tags faults ./...
# All checks but the form of comments and names: XenAPI gives names, tests check comments.
go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 -checks "all,-ST1000,-ST1003,-ST1005,-ST1016,-ST1020,-ST1021,-ST1022" ./...
go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 -tags faults -checks "all,-ST1000,-ST1003,-ST1005,-ST1016,-ST1020,-ST1021,-ST1022" ./...
