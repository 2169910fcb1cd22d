#!/bin/sh
# Installs what the lab needs and is missing. Does nothing, and needs no network, when all is there.
set -eu

die() { echo "lab setup: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "run as root: the lab makes network namespaces and TAP devices"
[ "$(uname -s)/$(uname -m)" = Linux/x86_64 ] || die "needs Linux on x86_64, this is $(uname -s) on $(uname -m)"
command -v apt-get >/dev/null 2>&1 || die "needs Debian 12: apt-get is not there"
. /etc/os-release 2>/dev/null || die "needs Debian 12: /etc/os-release is not there"
if [ "${ID:-}" != debian ] || [ "${VERSION_ID:-0}" -lt 12 ] 2>/dev/null; then
    die "needs Debian 12, this is ${PRETTY_NAME:-unknown}"
fi
[ -c /dev/net/tun ] || die "/dev/net/tun is not there: the kernel needs TUN/TAP"

# command or file : the package that brings it
missing=
need() { [ -e "$1" ] || command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
need qemu-system-x86_64 qemu-system-x86
need ip iproute2
need tc iproute2
need ethtool ethtool
need iperf3 iperf3
need tcpdump tcpdump
need cpio cpio
need mkfs.ext4 e2fsprogs
need lz4 lz4
need xz xz-utils
need zstd zstd
need /bin/busybox busybox-static
ls /boot/vmlinuz-*-cloud-amd64 >/dev/null 2>&1 || missing="$missing linux-image-cloud-amd64"

# The dynamic busybox has no place in an initramfs without libraries.
if [ -e /bin/busybox ] && [ "$(dpkg-query -W -f '${db:Status-Status}' busybox-static 2>/dev/null)" != installed ]; then
    missing="$missing busybox-static"
fi

if [ -n "$missing" ]; then
    echo "lab setup: installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    apt-get install -y --no-install-recommends $missing >/dev/null 2>&1 ||
        { apt-get update >/dev/null && apt-get install -y --no-install-recommends $missing >/dev/null; } ||
        die "apt-get could not install:$missing"
fi
