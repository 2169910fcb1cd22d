#!/bin/sh
# Builds the guests' kernel and initramfs from Debian's packages and our workload: OUT/vmlinux, OUT/initramfs.cpio,
# OUT/tools.cpio (the same with iperf3 and ethtool), and OUT/gangway-workload, the same static program for the outside
# clients. Rebuilds only what has changed.
# usage: deploy/lab/image.sh [OUT]        (default: target/lab)
set -eu

die() { echo "lab image: $*" >&2; exit 1; }

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-$root/target/lab}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# Two tests that start together must not build into the same folder.
exec 9>"$out/.lock"
flock 9

[ -x /bin/busybox ] || die "/bin/busybox is not there; run deploy/lab/setup.sh"
kernel=$(ls /boot/vmlinuz-*-cloud-amd64 2>/dev/null | sort -V | tail -n 1)
[ -n "$kernel" ] || die "no /boot/vmlinuz-*-cloud-amd64; run deploy/lab/setup.sh"
version=${kernel#/boot/vmlinuz-}
modules=/lib/modules/$version/kernel
[ -d "$modules" ] || die "$modules is not there; reinstall the package linux-image-$version"

# --- the workload: own target folder, so that the flags below do not invalidate the main build
target=x86_64-unknown-linux-gnu
(cd "$root" && RUSTFLAGS='-C target-feature=+crt-static' CARGO_TARGET_DIR="$out/cargo" \
    cargo build --quiet --release --target $target -p gangway-tests --no-default-features --bin gangway-workload) ||
    die "the workload does not build"
workload=$out/cargo/$target/release/gangway-workload
if ! cmp -s "$workload" "$out/gangway-workload"; then
    cp "$workload" "$out/gangway-workload.new"
    mv "$out/gangway-workload.new" "$out/gangway-workload"
fi

# --- the kernel: the ELF inside the bzImage boots through PVH, 0.7 s faster than the bzImage itself
u8() { od -An -tu1 -j "$1" -N 1 "$kernel" | tr -d ' '; }
u32() { od -An -tu4 -j "$1" -N 4 "$kernel" | tr -d ' '; }
unpack() {
    # Linux boot protocol 2.08: setup_sects at 0x1f1, payload_offset at 0x248, payload_length at 0x24c
    start=$((($(u8 497) + 1) * 512 + $(u32 584)))
    tail -c +$((start + 1)) "$kernel" | head -c "$(u32 588)" >"$out/payload"
    case $(od -An -tx1 -N 4 "$out/payload" | tr -d ' ') in
    02214c18) lz4 -dc "$out/payload" ;;
    1f8b*) gzip -dc "$out/payload" ;;
    fd377a58) xz -dc "$out/payload" ;;
    28b52ffd) zstd -dc "$out/payload" ;;
    *) return 1 ;;
    esac >"$out/vmlinux.new" 2>/dev/null || true # four bytes of size follow the stream, some unpackers object
    rm -f "$out/payload"
    [ "$(head -c 4 "$out/vmlinux.new" | tail -c 3)" = ELF ]
}
stamp="$kernel $(stat -c '%s %Y' "$kernel")"
if [ ! -s "$out/vmlinux" ] || [ "$(cat "$out/vmlinux.stamp" 2>/dev/null)" != "$stamp" ]; then
    unpack || cp "$kernel" "$out/vmlinux.new"
    mv "$out/vmlinux.new" "$out/vmlinux"
    echo "$stamp" >"$out/vmlinux.stamp"
fi

# --- the initramfs
order='virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover virtio_net virtio-rng virtio_balloon'
stamp="$version $order $(sha256sum "$out/gangway-workload" /bin/busybox "$here/init" "$here/image.sh" | sha256sum)"
if [ ! -s "$out/initramfs.cpio" ] || [ "$(cat "$out/initramfs.stamp" 2>/dev/null)" != "$stamp" ]; then
    tree=$(mktemp -d "$out/tree.XXXXXX")
    trap 'rm -rf "$tree"' EXIT
    mkdir -p "$tree/bin" "$tree/modules"
    cp /bin/busybox "$tree/bin/busybox"
    cp "$here/init" "$tree/init"
    chmod 755 "$tree/init"
    cp "$out/gangway-workload" "$tree/gangway-workload"
    strip "$tree/gangway-workload" 2>/dev/null || true
    for module in $order; do
        file=$(find "$modules" -name "$module.ko" -o -name "$module.ko.xz" -o -name "$module.ko.zst" -o -name "$module.ko.gz" | head -n 1)
        case $file in
        *.ko) cp "$file" "$tree/modules/$module.ko" ;;
        *.ko.xz) xz -dc "$file" >"$tree/modules/$module.ko" ;;
        *.ko.zst) zstd -dcq "$file" >"$tree/modules/$module.ko" ;;
        *.ko.gz) gzip -dc "$file" >"$tree/modules/$module.ko" ;;
        *) continue ;; # built into this kernel
        esac
        echo "$module" >>"$tree/modules/order"
    done
    touch "$tree/modules/order"
    (cd "$tree" && find . | cpio --quiet -o -H newc) >"$out/initramfs.cpio.new"
    mv "$out/initramfs.cpio.new" "$out/initramfs.cpio"
    echo "$stamp" >"$out/initramfs.stamp"
fi

# --- the same with tools of Debian and the libraries that they need
tools='iperf3 ethtool'
files=
for tool in $tools; do
    path=$(command -v "$tool") || die "$tool is not there; run deploy/lab/setup.sh"
    files="$files $path $(ldd "$path" | grep -o '/[^ ]*')"
done
# shellcheck disable=SC2086
files=$(printf '%s\n' $files | sort -u)
# shellcheck disable=SC2086
stamp="$(sha256sum "$out/initramfs.stamp" $files | sha256sum)"
if [ ! -s "$out/tools.cpio" ] || [ "$(cat "$out/tools.stamp" 2>/dev/null)" != "$stamp" ]; then
    more=$(mktemp -d "$out/tree.XXXXXX")
    trap 'rm -rf "$more" "${tree:-}"' EXIT
    for file in $files; do
        mkdir -p "$more$(dirname "$file")"
        cp -L "$file" "$more$file"
    done
    # The kernel unpacks one archive after the other.
    { cat "$out/initramfs.cpio"; (cd "$more" && find . | cpio --quiet -o -H newc); } >"$out/tools.cpio.new"
    mv "$out/tools.cpio.new" "$out/tools.cpio"
    echo "$stamp" >"$out/tools.stamp"
fi
