#!/usr/bin/env bash
# The main job, end to end, on a temporary state directory: a signing key, a
# signed 64 MiB patch, upload, apply, the records, the effect on the host. Then
# storage: an SR of its own, an upload that is killed, a revision, a damaged
# image. Leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin
patchd=$(realpath "${1:-bin/patchd}")
if [ "$(id -u)" -ne 0 ]; then
	echo "the demo attaches a loop device and mounts a filesystem: run it as root" >&2
	exit 1
fi

work=$(mktemp -d /var/tmp/patchd-demo.XXXXXX)
daemon=
export XDG_STATE_HOME=$work/client
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "${*//$patchd/patchd}"; "$@"; }

# uuid_of gives the uuid of the one disk image that the patch of this name is in.
uuid_of() { "$patchd" vdi list | awk -v patch="$1" '$(NF-1) == patch { print $1 }'; }

cleanup() {
	status=$?
	trap - EXIT
	if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
		kill "$daemon" && wait "$daemon" || true
	fi
	GNUPGHOME=$work/gpg gpgconf --kill all 2>/dev/null || true
	[ "$status" -eq 0 ] || { echo "the demo failed; the daemon said:" >&2; tail -n 30 "$work/daemon.log" >&2 || true; }
	rm -rf "$work"
	exit "$status"
}
trap cleanup EXIT

say "A daemon on a state directory of its own"
export PATCHD_STATE_DIR=$work/state
"$patchd" serve --listen 127.0.0.1:0 --tls-listen 127.0.0.1:0 --patch-dir "$work/patches" 2>"$work/daemon.log" &
daemon=$!
for _ in $(seq 300); do
	"$patchd" status >/dev/null 2>&1 && break
	kill -0 "$daemon" 2>/dev/null || { cat "$work/daemon.log" >&2; exit 1; }
	sleep 0.1
done
run "$patchd" status

say "A signing key, made by gpg, and trusted by this host"
export GNUPGHOME=$work/gpg
mkdir -m 700 "$GNUPGHOME"
gpg --quiet --batch --passphrase '' --quick-generate-key 'Demo Signer <signer@example.test>' rsa3072 sign never 2>/dev/null
gpg --export >"$work/signer.gpg"
run "$patchd" key trust "$work/signer.gpg"

say "A patch of 64 MiB, built from a folder and signed"
mkdir -p "$work/hello/files"
cat >"$work/hello/info.toml" <<-EOF
	name-label = "hello"
	name-description = "writes a greeting onto the host"
	version = "1.0"
	after-apply-guidance = ["restartXAPI"]
EOF
cat >"$work/hello/precheck" <<-'EOF'
	#!/bin/sh
	[ -d "$PATCHD_SCRATCH" ] || { echo "no scratch room"; exit 2; }
EOF
cat >"$work/hello/apply" <<-EOF
	#!/bin/sh
	set -e
	echo "0.2 copying the payload in the scratch room" >&3
	cp -r files "\$PATCHD_SCRATCH/second-copy"
	echo "0.9 greeting the host" >&3
	echo "patched by \$PATCHD_PATCH_UUID" >"$work/greeting"
	echo "hello from the patch"
EOF
chmod +x "$work/hello/precheck" "$work/hello/apply"
head -c 64M /dev/urandom >"$work/hello/files/payload.bin"
run "$patchd" patch build "$work/hello" --gpg-key signer@example.test --out "$work/hello.xsupdate"
run "$patchd" patch verify "$work/hello.xsupdate"

say "Upload: it streams into a disk image on the default SR"
run "$patchd" patch upload "$work/hello.xsupdate" | tee "$work/out"
uuid=$(tail -n 1 "$work/out")
run "$patchd" patch list
run "$patchd" vdi list

say "Apply: a private clone or copy is mounted and the patch runs from it"
run "$patchd" patch precheck "$uuid"
run "$patchd" patch apply "$uuid"

say "What the pool knows, and what the host has"
run "$patchd" patch show "$uuid"
run cat "$work/patches/applied/$uuid"
run cat "$work/greeting"
grep -q "$uuid" "$work/greeting"

say "Free its room: the record stays, for the host has the patch"
vdi=$(uuid_of hello)
run "$patchd" vdi destroy "$vdi"
run "$patchd" patch list

say "Storage: XFS in an image file, where clones take no time"
run "$patchd" sr create --name patches --type xfs --device-config "device=$work/patches.img,size=1GiB"
run "$patchd" sr set-default patches
run "$patchd" sr list

say "An upload whose client is killed goes on where it was"
cp -r "$work/hello" "$work/world"
sed -i 's/hello/world/' "$work/world/info.toml"
run "$patchd" patch build "$work/world" --gpg-key signer@example.test --out "$work/world.xsupdate"
"$patchd" patch upload "$work/world.xsupdate" &
upload=$!
until grep -qs location "$XDG_STATE_HOME/patchd/uploads.json"; do # it has begun
	kill -0 "$upload" || break
	sleep 0.01
done
sleep 0.05
kill -9 "$upload" 2>/dev/null || true
wait "$upload" 2>/dev/null || true
run "$patchd" task list
run "$patchd" patch upload "$work/world.xsupdate"
run "$patchd" patch upload "$work/world.xsupdate"

say "Damage is found, and mended from a copy on another SR"
vdi=$(uuid_of world)
run "$patchd" vdi copy "$vdi" --sr "Local storage"
image=$(echo "$work"/state/mnt/*/"$vdi.img")
echo damage | run dd of="$image" bs=1 seek=40000000 conv=notrunc status=none
run "$patchd" vdi verify "$vdi" || echo "(exit code $?)"
run "$patchd" vdi repair "$vdi"
run "$patchd" vdi verify "$vdi"

say "Stop"
kill "$daemon"
wait "$daemon"
daemon=
if losetup -a 2>/dev/null | grep -q "$work" || grep -q "$work" /proc/self/mountinfo; then
	echo "a loop device or mount was left behind" >&2
	exit 1
fi
echo "nothing is left behind"
