#!/usr/bin/env bash
# Tests that need a kernel of their own (device-mapper, an NFS server and
# client), inside a virtual machine under software emulation. The test binary
# and patchd are built outside and travel on a second disk. Arguments go to the
# test binary: scripts/vm.sh -test.run NFS. Needs root once, to make the machine.
#
#   PATCHD_VM_ACCEL    how qemu runs the guest (tcg,thread=multi)
#   PATCHD_VM_TIMEOUT  seconds after which the guest is ended (1200)
#   PATCHD_VM_INIT     a script that the guest runs instead of the tests
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin CGO_ENABLED=0
image=$(scripts/vm-image.sh)
work=$(mktemp -d)
qemu= reader=
cleanup() {
	if [ -n "$qemu" ]; then kill -9 "$qemu" 2>/dev/null || true; fi
	if [ -n "$reader" ]; then kill "$reader" 2>/dev/null || true; fi
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

mkdir "$work/data"
if [ -z "${PATCHD_VM_INIT:-}" ]; then
	go build -trimpath -o "$work/data/patchd" ./cmd/patchd
	go test -tags vm -c -o "$work/data/vm.test" ./integration/vm
fi
install -m 755 "${PATCHD_VM_INIT:-integration/vm/init}" "$work/data/init"
printf '%s\n' "$@" >"$work/data/args"
mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$work/data" "$work/data.img" 8G

: >"$work/console"
qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
	-machine q35 -accel "${PATCHD_VM_ACCEL:-tcg,thread=multi}" -cpu max -smp 2 -m 2048 \
	-serial "file:$work/console" -kernel "$image/kernel" \
	-append "console=ttyS0 panic=-1 root=/dev/nvme0n1 rw init=/sbin/test-init quiet mitigations=off" \
	-drive "file=$image/root.img,if=none,id=root,format=raw,cache=unsafe,snapshot=on" -device nvme,drive=root,serial=root \
	-drive "file=$work/data.img,if=none,id=data,format=raw,cache=unsafe" -device nvme,drive=data,serial=data &
qemu=$!
tail --pid="$qemu" -n +1 -f "$work/console" | sed -u 's/\r//g' &
reader=$!
limit=${PATCHD_VM_TIMEOUT:-1200}
while kill -0 "$qemu" 2>/dev/null; do
	if [ "$SECONDS" -ge "$limit" ]; then
		echo "the virtual machine did not end within $limit s" >&2
		exit 124
	fi
	sleep 0.5
done
wait "$qemu" || { echo "qemu failed" >&2; exit 1; }
qemu=
wait "$reader" || true
reader=
status=$(sed -n 's/\r//; s/^guest: status \([0-9]*\)$/\1/p' "$work/console" | tail -1)
if [ -z "$status" ]; then
	echo "the virtual machine ended without a status" >&2
	exit 1
fi
exit "$status"
