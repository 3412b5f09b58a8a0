#!/usr/bin/env bash
# Makes the virtual machine that `make test-vm` starts, and prints the folder
# it lies in: kernel, root.img. It is made once, from the machine's own package
# sources, and kept in ${XDG_CACHE_HOME:-~/.cache}/patchd-vm under a hash of this
# file. Needs root. Nothing is installed but qemu and mmdebstrap.
set -euo pipefail
self=$(readlink -f "$0")
export PATH=$PATH:/usr/sbin:/sbin
packages=(
	lvm2 thin-provisioning-tools dmsetup # lvm
	nfs-kernel-server nfs-common nftables # nfs
	xfsprogs btrfs-progs e2fsprogs        # what is exported
	mount kmod iproute2 procps gnupg
)
kernel=linux-image-cloud-amd64

declare -A tool=([qemu-system-x86_64]=qemu-system-x86 [mmdebstrap]=mmdebstrap [mke2fs]=e2fsprogs [depmod]=kmod)
missing=()
for t in "${!tool[@]}"; do
	command -v "$t" >/dev/null || missing+=("${tool[$t]}")
done
if [ ${#missing[@]} -gt 0 ]; then
	echo "installing: ${missing[*]}" >&2
	DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/patchd-vm
hash=$(sha256sum <"$self" | cut -c1-16)
image=$cache/$hash
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # two at once: one makes it, the other waits
if [ -e "$image/root.img" ]; then
	echo "$image"
	exit 0
fi

work=$(mktemp -d "$cache/making.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
cd "$work"
chmod 755 .
echo "making the virtual machine, once: kernel" >&2
name=$(apt-cache depends "$kernel" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -1)
[ -n "$name" ] || name=$kernel
(mkdir deb && chmod 777 deb && cd deb && apt-get download -qq "$name" >&2 && dpkg -x ./*.deb ../kernel)
version=$(ls kernel/lib/modules)

echo "making the virtual machine, once: root filesystem" >&2
shopt -s nullglob
sources=(/etc/apt/sources.list /etc/apt/sources.list.d/debian.sources)
lists=()
for s in "${sources[@]}"; do [ -s "$s" ] && lists+=("$s"); done
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
mmdebstrap --quiet --mode=root --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
	"$suite" root "${lists[@]}" >&2
mkdir -p root/usr/lib/modules
cp -a "kernel/lib/modules/$version" root/usr/lib/modules/
chroot root depmod "$version"
rm -rf root/var/cache/apt/* root/var/lib/apt/lists/*
mkdir -p root/data
# The guest's first process: mounts what every machine has, then gives way to
# what came on the second disk.
cat >root/sbin/test-init <<'INIT'
#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd
ip link set lo up
mkdir -p /run/lock
if mount -t ext4 /dev/nvme1n1 /data; then
	/data/init
	status=$?
else
	status=99
fi
echo "guest: status $status"
sync
echo o >/proc/sysrq-trigger
sleep 60
INIT
chmod 755 root/sbin/test-init

echo "making the virtual machine, once: disk" >&2
kib=$(du -sk root | cut -f1)
mke2fs -q -t ext4 -O ^has_journal -m 0 -d root root.img $((kib * 5 / 4 + 65536))k
mkdir "$work/done"
cp kernel/boot/vmlinuz-"$version" done/kernel
mv root.img done/root.img
chmod 755 done
rm -rf "$image"
mv done "$image"
for old in "$cache"/*/; do # made by another list of packages
	[ "$old" = "$image/" ] || [ "$old" = "$work/" ] || rm -rf --one-file-system "$old"
done
echo "$image"
