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
go run honnef.co/go/tools/cmd/staticcheck@2026.1 ./...
