#!/usr/bin/env bash
# Tests that need a kernel of their own (device-mapper, an NFS server and
# client), inside a virtual machine under software emulation. The test binary
# and patchd are built outside and travel on a second disk. Arguments go to the
# test binary: scripts/vm.sh -test.run NFS. Without any, two guests share the
# tests, one those of LVM. Needs root once, to make the machine.
#
#   PATCHD_VM_ACCEL    how qemu runs the guest (tcg,thread=multi)
#   PATCHD_VM_TIMEOUT  seconds after which the guests are ended (1200)
#   PATCHD_VM_INIT     a script that the guest runs instead of the tests
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin:/sbin CGO_ENABLED=0
image=$(scripts/vm-image.sh)
work=$(mktemp -d)
processes=()
cleanup() {
	for p in "${processes[@]}"; do kill -9 "$p" 2>/dev/null || true; done
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

# start NAME [ARGUMENT…]: a guest whose lines begin with its name.
guests=()
start() {
	local name=$1
	shift
	guests+=("$name")
	printf '%s\n' "$@" >"$work/data/args"
	mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$work/data" "$work/$name.img" 8G >/dev/null
	: >"$work/$name.console"
	qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot \
		-machine q35 -accel "${PATCHD_VM_ACCEL:-tcg,thread=multi}" -cpu max -smp 2 -m 2048 \
		-serial "file:$work/$name.console" -kernel "$image/kernel" \
		-append "console=ttyS0 panic=-1 root=/dev/nvme0n1 rw init=/sbin/test-init quiet mitigations=off" \
		-drive "file=$image/root.img,if=none,id=root,format=raw,cache=unsafe,snapshot=on" -device nvme,drive=root,serial=root \
		-drive "file=$work/$name.img,if=none,id=data,format=raw,cache=unsafe" -device nvme,drive=data,serial=data &
	local qemu=$!
	tail --pid="$qemu" -n +1 -f "$work/$name.console" > >(sed -u "s/\r//g; s/^/$name: /") &
	processes+=("$qemu" "$!")
}
if [ $# -gt 0 ] || [ -n "${PATCHD_VM_INIT:-}" ]; then
	start vm "$@"
else
	start lvm -test.run LVM
	start nfs -test.skip LVM
fi

limit=$((SECONDS + ${PATCHD_VM_TIMEOUT:-1200}))
for p in "${processes[@]}"; do
	while kill -0 "$p" 2>/dev/null; do
		if [ "$SECONDS" -ge "$limit" ]; then
			echo "a virtual machine did not end in time" >&2
			exit 124
		fi
		sleep 0.5
	done
	wait "$p" || { echo "a virtual machine failed" >&2; exit 1; }
done
processes=()
sleep 0.2 # the last lines are on their way to the terminal
for name in "${guests[@]}"; do
	status=$(sed -n 's/\r//; s/^guest: status \([0-9]*\)$/\1/p' "$work/$name.console" | tail -1)
	if [ "$status" != 0 ]; then
		echo "guest $name: ${status:-ended without a status}" >&2
		exit 1
	fi
done
