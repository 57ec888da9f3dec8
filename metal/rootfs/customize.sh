#!/bin/sh
# Run by mmdebstrap when the packages are in place, with the new root as first argument.
#
# Leaves in /tern-metal of that root, for tern-metal to take out: `vmlinuz` (Debian's kernel, never
# installed, only unpacked), `initramfs.cpio` (what finds and mounts the root file system) and
# `root.erofs` (the root file system itself). TERN_METAL_ASSETS holds this directory's other files;
# `modules` there is the part of the list for the kernel chosen, TERN_METAL_KERNEL: `stable`, which is
# that of the Debian release TERN_METAL_SUITE, or `backports`, that of the release's backports.
set -eu
root=$1
out=$root/tern-metal
mkdir -p "$out/kernel"

step() { echo "I: $*" >&2; }
fail() { echo "E: $*" >&2; exit 1; }

step "downloading the kernel ($TERN_METAL_KERNEL)"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
image=linux-image-amd64
if [ "$TERN_METAL_KERNEL" = backports ]; then
    # From the mirror, and by the key, that the release comes from; for this download alone.
    backports=$TERN_METAL_SUITE-backports
    list=$root/etc/apt/sources.list.d/$backports.list
    sed -n "s/^\(deb .*\) $TERN_METAL_SUITE \(.*\)/\1 $backports \2/p" "$root/etc/apt/sources.list" |
        head -n 1 > "$list"
    [ -s "$list" ] || fail "sources.list names no mirror of $TERN_METAL_SUITE"
    apt-get -q -o APT::Sandbox::User=root -o APT::Update::Error-Mode=any update >&2
    image=$image/$backports
fi
kernel=$(apt-cache depends "$image" |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*-amd64\(-unsigned\)\?\)$/\1/p' | head -n 1)
[ -n "$kernel" ] || fail "$image names no kernel package"
(cd "$out/kernel" && apt-get -q -o APT::Sandbox::User=root download "$kernel" >&2)
rm -f "$root/etc/apt/sources.list.d/$TERN_METAL_SUITE-backports.list"
dpkg -x "$out"/kernel/*.deb "$out/kernel"
release=$(basename "$out"/kernel/lib/modules/*)
mv "$out/kernel/boot/vmlinuz-$release" "$out/vmlinuz"

step "choosing the modules of $release"
from=$out/kernel/lib/modules/$release
to=$root/lib/modules/$release
mkdir -p "$to/kernel"
cp "$from/modules.builtin" "$from/modules.builtin.modinfo" "$from/modules.order" "$to/"
while read -r path; do
    mkdir -p "$(dirname "$to/kernel/$path")"
    if [ -e "$from/kernel/$path.xz" ]; then path=$path.xz; fi
    [ -e "$from/kernel/$path" ] || fail "$release has no $path, which rootfs/modules lists for it"
    cp -a "$from/kernel/$path" "$to/kernel/$path"
done < "$TERN_METAL_ASSETS/modules"
# Newer kernels come with compressed modules. Undone once, here, loading is quick under emulation, and
# the initramfs needs no decompressor.
find "$to/kernel" -name '*.ko.xz' -exec xz -d {} +
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
