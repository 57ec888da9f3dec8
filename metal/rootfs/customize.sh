#!/bin/sh
# Run by mmdebstrap when the packages are in place, with the new root as first argument.
#
# Leaves in /tern-metal of that root, for tern-metal to take out: `vmlinuz` (Debian's kernel, never
# installed, only unpacked), `initramfs.cpio` (what finds and mounts the root file system) and
# `root.erofs` (the root file system itself). TERN_METAL_ASSETS holds this directory's other files.
set -eu
root=$1
out=$root/tern-metal
mkdir -p "$out/kernel"

step() { echo "I: $*" >&2; }

step "downloading the kernel"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
kernel=$(apt-cache depends linux-image-amd64 |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*-amd64\)$/\1/p' | head -n 1)
[ -n "$kernel" ] || { echo "E: linux-image-amd64 names no kernel package" >&2; exit 1; }
(cd "$out/kernel" && apt-get -q -o APT::Sandbox::User=root download "$kernel" >&2)
dpkg -x "$out"/kernel/*.deb "$out/kernel"
release=$(basename "$out"/kernel/lib/modules/*)
mv "$out/kernel/boot/vmlinuz-$release" "$out/vmlinuz"

step "choosing the modules of $release"
from=$out/kernel/lib/modules/$release
to=$root/lib/modules/$release
mkdir -p "$to/kernel"
cp "$from/modules.builtin" "$from/modules.builtin.modinfo" "$from/modules.order" "$to/"
grep -v '^ *\(#\|$\)' "$TERN_METAL_ASSETS/modules" | while read -r path; do
    mkdir -p "$(dirname "$to/kernel/$path")"
    cp -a "$from/kernel/$path" "$to/kernel/$path"
done
chroot "$root" depmod "$release"

step "making the initramfs"
ir=$out/initramfs
mkdir -p "$ir/bin" "$ir/dev" "$ir/proc" "$ir/sys" "$ir/lower" "$ir/data" "$ir/root" "$ir/modules"
cp "$root/bin/busybox" "$ir/bin/busybox"
cp "$TERN_METAL_ASSETS/initramfs.sh" "$ir/init"
chmod 0755 "$ir/init"
# Dependencies come first in modprobe's answer, so inserting in this order needs no modprobe later.
for module in virtio_pci virtio_blk erofs overlay ext4; do
    chroot "$root" modprobe -S "$release" --show-depends "$module" >> "$out/needed"
done
sed -n 's/^insmod \([^ ]*\).*/\1/p' "$out/needed" | awk '!seen[$0]++' | while read -r file; do
    cp "$root$file" "$ir/modules/"
    basename "$file" >> "$ir/modules/order"
done
chroot "$root" sh -c 'cd /tern-metal/initramfs && find . | busybox cpio -o -H newc' \
    > "$out/initramfs.cpio" 2>/dev/null
rm -rf "$ir" "$out/kernel" "$out/needed"

step "making the root disk"
rm -f "$root/etc/resolv.conf" "$root/etc/machine-id"
# Read-only and uncompressed: pages go from the outer machine's cache into the host's unaltered.
chroot "$root" mkfs.erofs -x-1 \
    --exclude-regex='^(proc|sys|dev|run|tmp|boot)/.*' \
    --exclude-regex='^var/(lib/apt/lists|cache|log)/.*' \
    --exclude-regex='^tern-metal(/.*)?$' \
    /tern-metal/root.erofs / >&2
