#!/usr/bin/env bash
# Installs the npm clients that the tests run, in exactly the versions of the
# committed lock file. Does nothing where they are.
set -euo pipefail
cd "$(dirname "$0")/../integration/clients/npm"
want=$(sha256sum package-lock.json | cut -d' ' -f1)
stamp=node_modules/.installed
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0
echo "installing npm packages for the tests" >&2
npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --prefer-offline --loglevel=error >&2
echo "$want" >"$stamp"
