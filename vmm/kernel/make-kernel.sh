#!/usr/bin/env bash
# Builds the guest's own small kernel: Debian's source, our configuration (tern.config; README.md has
# the reasons and what it gains).
#
#   vmm/kernel/make-kernel.sh            build it, unless it is there; 15 minutes on two processors
#   vmm/kernel/make-kernel.sh --cached   print where it is; exit 1 if it has not been built
#
# The source is the package linux-source-6.1, fetched by apt (and so verified by it), with Debian's own
# patches. The result lies in ~/.cache/tern/guest under a name made of all that it is made of but the
# compiler: source version, configuration, the way it is built here. make-guest.sh takes it from there.
# JOBS says how many compilers run at once.
set -euo pipefail

SOURCE_PACKAGE=linux-source-6.1
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/tern/guest
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=$HERE/tern.config
# Lines that make prints for one build: for the progress report only.
STEPS=2160

main() {
    local version dir
    version=$(source_version)
    [[ -n $version ]] || die "apt knows no $SOURCE_PACKAGE: apt-get update"
    dir=$CACHE/kernel-tern-$({ echo "$version" && config_lines && declare -f build configure; } |
        sha256sum | cut -c1-16)
    case ${1:-} in
        --cached) [[ -d $dir ]] && echo "$dir" && return || exit 1 ;;
        '') ;;
        *) die "usage: make-kernel.sh [--cached]" ;;
    esac
    need apt-get:apt dpkg-deb:dpkg gcc:build-essential make:build-essential flex:flex bison:bison bc:bc \
        xz:xz-utils lz4:lz4 strip:binutils
    # objtool, which the kernel's jump labels and mitigations need, reads object files with it.
    echo '#include <gelf.h>' | gcc -E - >/dev/null 2>&1 || die "missing library: apt-get install libelf-dev"
    mkdir -p "$CACHE"
    # Not make-guest.sh's lock: Machines can be made while this goes on.
    exec 9>"$CACHE/lock-kernel"
    flock -n 9 || { say "waiting for another build"; flock 9; }
    if [[ ! -d $dir ]]; then
        scratch=$(mktemp -d "$CACHE/new-kernel.XXXXXX")
        trap 'rm -rf "$scratch"' EXIT
        build "$version" "$scratch/out"
        mv -T "$scratch/out" "$dir"
    fi
    say "ready: Linux $(<"$dir/release") in $dir"
}

source_version() {
    apt-cache show --no-all-versions "$SOURCE_PACKAGE" 2>/dev/null | sed -n 's/^Version: //p' | head -n 1
}

build() {
    local version=$1 to=$2 source=$scratch/source started=$SECONDS
    say "fetching $SOURCE_PACKAGE $version"
    mkdir -p "$source" "$scratch/deb" "$to/modules"
    (cd "$scratch/deb" && apt-get download -q=2 -o APT::Sandbox::User=root "$SOURCE_PACKAGE=$version" >&2) ||
        die "could not fetch $SOURCE_PACKAGE: apt-get update, then try again"
    dpkg-deb --fsys-tarfile "$scratch"/deb/*.deb | tar -xO --wildcards '*/linux-source-*.tar.xz' |
        tar -xJ -C "$source" --strip-components=1
    rm -r "$scratch/deb"
    configure "$source"
    say "compiling with $(gcc --version | head -n 1), ${JOBS:-$(nproc)} at once; the log is $scratch/log"
    # The same source gives the same kernel, whenever, wherever and by whomever it is built.
    make -C "$source" -j "${JOBS:-$(nproc)}" KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=tern \
        KBUILD_BUILD_HOST=tern vmlinux bzImage 2>&1 | tee "$scratch/log" | progress ||
        { tail -n 30 "$scratch/log" >&2; die "the kernel does not build"; }
    strip --strip-all -o "$to/vmlinux" "$source/vmlinux"
    install -m 444 "$source/arch/x86/boot/bzImage" "$to/vmlinuz"
    install -m 444 "$source/.config" "$to/config"
    make -s -C "$source" kernelrelease >"$to/release"
    : >"$to/modules-list" # everything is built in
    chmod a-w "$to/vmlinux"
    say "built in $(((SECONDS - started + 59) / 60)) minutes"
}

config_lines() {
    grep -E '^(CONFIG_|# CONFIG_.* is not set)' "$CONFIG"
}

# Kconfig drops silently what it does not know or whose needs are not met; here that is an error.
configure() {
    local source=$1 lost
    make -s -C "$source" allnoconfig KCONFIG_ALLCONFIG="$CONFIG" >&2
    lost=$(config_lines | grep -vxF -f "$source/.config" || true)
    [[ -z $lost ]] || die "Kconfig does not take these lines of tern.config:"$'\n'"$lost"
}

# Says how far it is, every twentieth of the way.
progress() {
    awk -v steps="$STEPS" '{
        now = int(20 * NR / steps)
        if (now > told && now < 20) { told = now; printf "make-kernel: %d %%\n", now * 5 > "/dev/stderr" }
    }'
}

# need PROGRAM:PACKAGE... : names in one go what is missing, and how to get it.
need() {
    local pair packages=()
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || packages+=("${pair##*:}")
    done
    [[ ${#packages[@]} -eq 0 ]] || die "missing programs: apt-get install ${packages[*]}"
}

say() { echo "make-kernel: $*" >&2; }
die() { say "$*"; exit 1; }

main "$@"
