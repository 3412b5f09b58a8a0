#!/usr/bin/env bash
# All tests: the packages, then the whole system. Needs root: loop devices,
# mounts, namespaces and control groups are real.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin
if [ "$(id -u)" -ne 0 ]; then
	echo "the tests attach loop devices and mount filesystems: run them as root" >&2
	exit 1
fi
export CGO_ENABLED=0
unformatted=$(gofmt -l cmd pkg integration)
if [ -n "$unformatted" ]; then
	echo "not formatted: $unformatted" >&2
	exit 1
fi
go vet ./...
go vet -tags bench ./integration/bench
exec go test -count=1 -timeout 30m ./...
