#!/usr/bin/env bash
# Makes what every Machine boots: OUTDIR/vmlinux and OUTDIR/initramfs.cpio; and OUTDIR/vmlinuz, the
# same kernel as distributions ship it, for the tests of the monitor.
#
#   vmm/kernel/make-guest.sh OUTDIR [TERN_INIT]
#
# The kernel is the small one of make-kernel.sh if it has been built (`make kernel`), and else Debian's
# for clouds; TERN_GUEST_KERNEL=tern or =debian insists on one. Debian's is fetched by apt (and so
# verified by it), and taken out of its bzImage: an uncompressed kernel starts at once and its pages can
# be shared between Machines. The initramfs holds tern-init as /init, the few modules that the kernel
# needs, and /lib/modules-list, which names them in the order in which they can be loaded (the small
# kernel needs none). Without TERN_INIT, tern-init is built here.
#
# Both are kept under ~/.cache/tern/guest by what they are made of, and OUTDIR gets hard links or
# copies of them (hence read-only): a second run takes less than a second.
set -euo pipefail

META_PACKAGE=linux-image-cloud-amd64
# All else that a guest needs is built into Debian's kernel (ext4, tmpfs, unix, inet6, ...).
MODULES=(virtio_mmio virtio_blk virtio_net vmw_vsock_virtio_transport virtio-rng virtio_balloon erofs overlay)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/tern/guest
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

main() {
    [[ $# -ge 1 && $# -le 2 ]] || die "usage: make-guest.sh OUTDIR [TERN_INIT]"
    local out=$1 init=${2:-}
    need apt-get:apt apt-cache:apt dpkg-deb:dpkg depmod:kmod cpio:cpio lz4:lz4 od:coreutils
    mkdir -p "$CACHE" "$out"
    exec 9>"$CACHE/lock"
    flock 9 # one at a time: two test runs may both find the cache empty

    scratch=$(mktemp -d "$CACHE/new.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT

    [[ -n $init ]] || init=$(build_init)
    local kernel initramfs
    kernel=$(kernel_dir)
    initramfs=$(initramfs_file "$kernel" "$init")
    install_file "$kernel/vmlinux" "$out/vmlinux"
    install_file "$kernel/vmlinuz" "$out/vmlinuz"
    install_file "$initramfs" "$out/initramfs.cpio"
    say "guest ready in $out: Linux $(<"$kernel/release")"
}

# Prints the directory that holds vmlinux, vmlinuz, release, modules-list and modules/ of the kernel.
kernel_dir() {
    local choice=${TERN_GUEST_KERNEL:-}
    case $choice in
        debian) ;;
        tern | '')
            "$HERE/make-kernel.sh" --cached && return
            [[ $choice != tern ]] || die "the small kernel has not been built from the present source: make kernel"
            ;;
        *) die "TERN_GUEST_KERNEL is $choice, must be tern or debian" ;;
    esac
    debian_kernel_dir
}

debian_kernel_dir() {
    local package version dir
    read -r package version < <(kernel_package) || die "apt knows no $META_PACKAGE: apt-get update"
    dir=$CACHE/kernel-$(key "$package" "$version" "${MODULES[*]}" "$(declare -f unpack_kernel extract_vmlinux)")
    if [[ ! -d $dir ]]; then
        say "fetching $package $version"
        unpack_kernel "$package=$version" "$scratch/kernel"
        chmod a-w "$scratch/kernel/vmlinux"
        mv -T "$scratch/kernel" "$dir"
    fi
    echo "$dir"
}

# Prints the name and version of the newest kernel package that the meta package stands for.
kernel_package() {
    apt-cache show --no-all-versions "$META_PACKAGE" 2>/dev/null |
        sed -nE 's/^Depends: ([^ ,]+) \(= ([^)]+)\).*/\1 \2/p'
}

unpack_kernel() {
    local package=$1 to=$2 release module file
    mkdir -p "$to/modules" "$scratch/deb" "$scratch/root"
    # apt's own sandbox user cannot write here, and says so; that is its only note worth hiding.
    (cd "$scratch/deb" && apt-get download -q=2 -o APT::Sandbox::User=root "$package" >&2) ||
        die "could not fetch $package: apt-get update, then try again"
    dpkg-deb --extract "$scratch"/deb/*.deb "$scratch/root"
    release=$(ls "$scratch/root/lib/modules")
    install -m 444 "$scratch/root/boot/vmlinuz-$release" "$to/vmlinuz"
    extract_vmlinux "$to/vmlinuz" "$to/vmlinux"
    echo "$release" >"$to/release"

    local modules=$scratch/root/lib/modules/$release
    depmod --basedir "$scratch/root" "$release"
    : >"$to/modules-list"
    for module in "${MODULES[@]}"; do
        if grep -qE "/$module\.ko$" "$modules/modules.builtin"; then
            continue
        fi
        # `modules.dep` names a module, then all it needs; what must be loaded first stands last.
        for file in $(sed -nE "s#^([^:]*/$module\.ko[^:]*): ?(.*)#\1 \2#p" "$modules/modules.dep" |
            tr ' ' '\n' | grep . | tac); do
            local name=${file##*/}
            name=${name%%.ko*}.ko
            if ! grep -qxF "$name" "$to/modules-list"; then
                echo "$name" >>"$to/modules-list"
                decompress "$modules/$file" >"$to/modules/$name"
            fi
        done
        grep -qxF "$module.ko" "$to/modules-list" || die "$package has no module $module"
    done
}

decompress() {
    case $1 in
        *.ko) cat "$1" ;;
        *.xz) need xz:xz-utils && xz -dc "$1" ;;
        *.zst) need zstd:zstd && zstd -dcq "$1" ;;
        *.gz) gzip -dc "$1" ;;
        *) die "unknown compression: $1" ;;
    esac
}

# A bzImage says in its header where its compressed kernel lies
# (Documentation/x86/boot.rst: setup_sects, payload_offset, payload_length).
extract_vmlinux() {
    local image=$1 to=$2 setup_sects offset length
    [[ $(dd if="$image" bs=1 skip=$((0x206)) count=2 status=none | od -An -tu2 | tr -d ' ') -ge 520 ]] ||
        die "$image: the boot protocol is older than 2.08"
    setup_sects=$(od -An -tu1 -j $((0x1f1)) -N1 "$image" | tr -d ' ')
    offset=$(od -An -tu4 -j $((0x248)) -N4 "$image" | tr -d ' ')
    length=$(od -An -tu4 -j $((0x24c)) -N4 "$image" | tr -d ' ')
    offset=$((offset + (setup_sects + 1) * 512))
    local payload=$scratch/payload
    # The payload's last four bytes are the size of what it holds.
    tail -c +$((offset + 1)) "$image" | head -c $((length - 4)) >"$payload" || true
    case $(od -An -tx4 -N4 "$payload" | tr -d ' ') in
        184c2102) lz4 -dcq "$payload" >"$to" ;;
        fd2fb528) need zstd:zstd && zstd -dcq "$payload" >"$to" ;;
        587a37fd) need xz:xz-utils && xz -dcq "$payload" >"$to" ;;
        *8b1f) gzip -dcq "$payload" >"$to" ;;
        *) die "$image: compressed in a way that this script does not know" ;;
    esac
    [[ $(head -c 4 "$to" | od -An -tx1 | tr -d ' ') == 7f454c46 ]] || die "$image holds no ELF kernel"
}

# Prints the path of the archive with this init and the kernel's modules.
initramfs_file() {
    local kernel=$1 init=$2 file
    [[ -x $init ]] || die "$init: not an executable"
    file=$CACHE/initramfs-$(key "$kernel" "$(sha256sum <"$init")" "$(declare -f pack_initramfs)").cpio
    if [[ ! -f $file ]]; then
        pack_initramfs "$kernel" "$init" "$scratch/initramfs.cpio"
        chmod a-w "$scratch/initramfs.cpio"
        mv -T "$scratch/initramfs.cpio" "$file"
    fi
    echo "$file"
}

# Not compressed: it is small, and a guest's memory is faster than its processor.
pack_initramfs() {
    local kernel=$1 init=$2 to=$3 root=$scratch/initramfs
    mkdir -p "$root/lib"
    install -m 755 "$init" "$root/init"
    cp -r "$kernel/modules" "$root/lib/modules"
    cp "$kernel/modules-list" "$root/lib/modules-list"
    find "$root" -exec touch -h -d @0 {} +
    (cd "$root" && find . -mindepth 1 -printf '%P\n' | LC_ALL=C sort |
        cpio --quiet --create --format=newc --owner=0:0 --reproducible) >"$to"
}

# Builds tern-init and prints where it is. Its own target directory keeps the flags for a static
# program from making cargo build everything else anew.
build_init() {
    local target=${CARGO_TARGET_DIR:-$HERE/../../target}/guest-init
    (cd "$HERE/../.." && RUSTFLAGS="-C target-feature=+crt-static" CARGO_TARGET_DIR="$target" \
        cargo build --quiet --package tern-init --profile guest --target x86_64-unknown-linux-gnu) >&2 ||
        die "tern-init does not build"
    echo "$target/x86_64-unknown-linux-gnu/guest/tern-init"
}

install_file() {
    if ! [[ $2 -ef $1 ]]; then
        ln -f "$1" "$2" 2>/dev/null || cp -f "$1" "$2"
    fi
}

key() {
    printf '%s\0' "$@" | sha256sum | cut -c1-16
}

# need PROGRAM:PACKAGE... : names in one go what is missing, and how to get it.
need() {
    local pair packages=()
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null ||
            packages+=("${pair##*:}")
    done
    [[ ${#packages[@]} -eq 0 ]] || die "missing programs: apt-get install ${packages[*]}"
    PATH=$PATH:/usr/sbin
}

say() { echo "make-guest: $*" >&2; }
die() { say "$*"; exit 1; }

main "$@"
