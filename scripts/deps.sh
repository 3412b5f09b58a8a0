#!/usr/bin/env bash
# Installs from Debian what is missing: `deps.sh demo` what the demo uses (gpg
# to make a real signature), `deps.sh test` also filesystem tools to make and
# check real images, networks for pools, and curl, Python and node as unmodified
# clients; `deps.sh bench` an SSH server to compare with as well. Does nothing
# where all is there.
set -euo pipefail

declare -A package=([gpg]=gnupg [losetup]=mount [mount]=mount)
if [ "${1:-test}" != demo ]; then
	package+=(
		[curl]=curl [e2fsck]=e2fsprogs [mkfs.xfs]=xfsprogs [mkfs.btrfs]=btrfs-progs
		[unshare]=util-linux [nsenter]=util-linux [python3]=python3 [node]=nodejs [npm]=npm [ip]=iproute2 [tc]=iproute2 [git]=git
	)
fi
if [ "${1:-test}" = bench ]; then
	package+=([sshd]=openssh-server [ssh]=openssh-client)
fi
export PATH=$PATH:/usr/sbin:/sbin
missing=()
for tool in "${!package[@]}"; do
	command -v "$tool" >/dev/null || missing+=("${package[$tool]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ]; then
	echo "these Debian packages are missing, and only root can install them: ${missing[*]}" >&2
	exit 1
fi
echo "installing: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2
apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
