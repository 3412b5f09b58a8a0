#!/usr/bin/env bash
# A pool in one terminal: three coordinators on a real etcd cluster, a patch that
# goes host by host, the coordinator killed in the middle of it, and a fourth
# host that joins and is brought level. Everything listens on 127/8. Leaves
# nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin
patchd=$(realpath "${1:-bin/patchd}")
etcd=$(realpath "${2:-bin/etcd}")
if [ "$(id -u)" -ne 0 ]; then
	echo "the demo attaches loop devices and mounts filesystems: run it as root" >&2
	exit 1
fi

work=$(mktemp -d /var/tmp/patchd-demo-pool.XXXXXX)
net=127.$((64 + $$ / 250 % 150)).$((1 + $$ % 250)) # other demos have other addresses
declare -A pids=()                                 # of etcd1 … etcd3 and host1 … host4
export XDG_STATE_HOME=$work/client GNUPGHOME=$work/gpg
bold=$'\033[1m' plain=$'\033[0m'
[ -t 1 ] || bold='' plain=''
say() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }

# on runs patchd on a host, tell also shows the command.
on() {
	local host=$1
	shift
	PATCHD_STATE_DIR=$work/$host/state "$patchd" "$@"
}
tell() {
	printf '%s# patchd %s\n' "$1" "${*:2}"
	on "$@"
}

cleanup() {
	status=$?
	trap - EXIT
	for name in host4 host3 host2 host1 etcd1 etcd2 etcd3; do stop "$name" 2>/dev/null || true; done
	gpgconf --kill all 2>/dev/null || true
	if [ "$status" -ne 0 ]; then
		echo "the demo failed; the hosts said:" >&2
		tail -n 15 "$work"/host*/log >&2 || true
	fi
	rm -rf "$work"
	exit "$status"
}
trap cleanup EXIT

# stop ends what was started under a name.
stop() { [ -z "${pids[$1]:-}" ] || { kill "${pids[$1]}" && wait "${pids[$1]}"; }; }

# await waits until a command succeeds, for 30 s.
await() {
	for _ in $(seq 300); do
		"$@" >/dev/null 2>&1 && return
		sleep 0.1
	done
	echo "not within 30 s: $*" >&2
	return 1
}

up_etcd() {
	mkdir -p "$work/etcd$1"
	"$etcd" "etcd$1" "$work/etcd$1/data" "http://$net.1$1:2379" "http://$net.1$1:2380" "$members" \
		>"$work/etcd$1/log" 2>&1 &
	pids[etcd$1]=$!
}

up_host() {
	local host=$1
	shift
	mkdir -p "$work/$host"
	PATCHD_ROOT_PASSWORD=demo unshare --uts -- sh -c 'hostname "$0" && exec "$@"' "$host" \
		"$patchd" serve --state-dir "$work/$host/state" --patch-dir "$work/$host/patches" \
		--listen "$net.${host#host}:8080" --tls-listen "$net.${host#host}:8443" "$@" 2>>"$work/$host/log" &
	pids[$host]=$!
}

# leader finds the host that leads, when there is one.
leader() {
	for _ in $(seq 300); do
		for host in host1 host2 host3; do
			if kill -0 "${pids[$host]}" 2>/dev/null && on "$host" host list >/dev/null 2>&1; then
				echo "$host"
				return
			fi
		done
		sleep 0.1
	done
	echo "no host leads" >&2
	return 1
}
uuid_of() { cat "$work/$1/state/host-uuid"; }
effects() { cat "$work"/effects/* 2>/dev/null | wc -l; }

say "Three members of etcd, three hosts that have their pool in it"
members=etcd1=http://$net.11:2380,etcd2=http://$net.12:2380,etcd3=http://$net.13:2380
store=etcd://$net.11:2379,$net.12:2379,$net.13:2379
for i in 1 2 3; do up_etcd "$i"; done
for i in 1 2 3; do up_host "host$i" --store "$store"; done
for i in 1 2 3; do await curl -sf "http://$net.$i:8080/healthz"; done
first=$(leader)
tell "$first" host list
for host in host1 host2 host3; do
	[ "$host" = "$first" ] || { other=$host; break; }
done
tell "$other" status

say "A signing key, which each host is told to trust: no coordinator can do that for them"
mkdir -m 700 "$GNUPGHOME"
gpg --quiet --batch --passphrase '' --quick-generate-key 'Demo Signer <signer@example.test>' ed25519 sign never 2>/dev/null
gpg --export >"$work/signer.gpg"
for host in host1 host2 host3; do on "$host" key trust "$work/signer.gpg" >/dev/null; done
tell "$first" key list

say "A patch of 16 MiB that takes three seconds, and leaves one line on each host"
mkdir -p "$work/slow/files" "$work/effects"
cat >"$work/slow/info.toml" <<-EOF
	name-label = "slow"
	name-description = "takes its time on each host"
	version = "1.0"
	after-apply-guidance = []
EOF
printf '#!/bin/sh\nexit 0\n' >"$work/slow/precheck"
cat >"$work/slow/apply" <<-EOF
	#!/bin/sh
	set -e
	sleep 3
	echo "patched by \$PATCHD_PATCH_UUID" >>"$work/effects/\$PATCHD_HOST_UUID"
EOF
chmod +x "$work/slow/precheck" "$work/slow/apply"
head -c 16M /dev/urandom >"$work/slow/files/payload.bin"
on "$first" patch build "$work/slow" --gpg-key signer@example.test --out "$work/slow.xsupdate" >/dev/null
tell "$first" patch upload "$work/slow.xsupdate" | tee "$work/out"
patch=$(tail -n 1 "$work/out")
echo "(the upload ended when a second host had the bytes, too)"

say "One canary, then one host after the other"
tell "$first" patch pool-apply "$patch" --canary 1 --at-once 1 --coordinator last --wait-away 5m --dry-run
tell "$first" patch pool-apply "$patch" --canary 1 --at-once 1 --coordinator last --wait-away 5m --detach | tee "$work/out"
run=$(awk 'END { print $NF }' "$work/out")
tell "$first" run watch "$run" &
watcher=$!
until [ "$(effects)" -ge 1 ]; do sleep 0.1; done
sleep 1
say "The coordinator $first is killed while the second host is at work"
kill -9 "${pids[$first]}"
killed=$(date +%s%N)
wait "${pids[$first]}" 2>/dev/null || true
wait "$watcher" 2>/dev/null || true
second=$(leader)
echo "$second answers after $((($(date +%s%N) - killed) / 1000000)) ms, and goes on with the run:"
tell "$second" run show "$run"
tell "$second" why "$(uuid_of "$first")" "$patch" || true

say "$first comes back, and stands by"
up_host "$first" --store "$store"
tell "$second" run watch "$run"
await curl -sf "http://$net.${first#host}:8080/healthz"
tell "$first" status
tell "$second" pool compliance "$patch"
for host in host1 host2 host3; do
	n=$(wc -l <"$work/effects/$(uuid_of "$host")")
	echo "$host has been patched $n time(s)"
	[ "$n" -eq 1 ]
done

say "A fourth host joins by a token: a member, which has no access to the database"
up_host host4
await curl -sf "http://$net.4:8080/healthz"
token=$(on "$second" pool token)
echo "$second# patchd pool token"
echo "${token:0:8}…"
echo "host4# patchd pool join https://$net.${second#host}:8443 --token ${token:0:8}… --trust-keys --align"
on host4 pool join "https://$net.${second#host}:8443" --token "$token" --trust-keys --align
await test -s "$work/effects/$(uuid_of host4)"
until on "$second" pool compliance "$patch" --output json | grep -c '"yes"' | grep -qx 4; do sleep 0.2; done
tell "$second" host list
tell "$second" pool compliance "$patch"

say "Stop"
for name in host4 host3 host2 host1 etcd1 etcd2 etcd3; do stop "$name" || true; done
pids=()
if losetup -a 2>/dev/null | grep -q "$work" || grep -q "$work" /proc/self/mountinfo; then
	echo "a loop device or mount was left behind" >&2
	exit 1
fi
echo "nothing is left behind, after $SECONDS seconds"
