#!/usr/bin/env bash
# Makes <example>/rootfs.tar: a small Debian from Debian's packages alone, with those that the file
# <example>/packages names. <example>/customize.sh, if there is one, is run last, with the root's path.
# Kept under ~/.cache/tern/rootfs by what it is made of, so that the second time takes no time.
#
#   make-rootfs.sh EXAMPLE
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

SUITE=bookworm
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/tern/rootfs
EXAMPLE=${1:?name an example}
PACKAGES=$(paste -sd, "$EXAMPLE/packages")

main() {
    command -v mmdebstrap >/dev/null || die "missing program: apt-get install mmdebstrap"
    # A newer version in Debian is a reason to make it anew; without apt's lists the last one will do.
    local versions key cached
    versions=$(apt-cache show --no-all-versions ${PACKAGES//,/ } 2>/dev/null | sed -n 's/^Version: //p' | paste -sd' ' || true)
    key=$({ cat make-rootfs.sh "$EXAMPLE/packages"; cat "$EXAMPLE/customize.sh" 2>/dev/null || true; echo "$versions"; } | sha256sum | cut -c1-16)
    cached=$CACHE/$EXAMPLE-$key.tar
    if [[ ! -f $cached ]]; then
        echo "$EXAMPLE: making a root file system of $SUITE with $PACKAGES ($versions)" >&2
        mkdir -p "$CACHE"
        make_rootfs "$cached.$$"
        mv "$cached.$$" "$cached"
    fi
    if [[ $(cat "$EXAMPLE/rootfs.key" 2>/dev/null) != "$key" || ! -f $EXAMPLE/rootfs.tar ]]; then
        cp --reflink=auto "$cached" "$EXAMPLE/rootfs.tar"
        echo "$key" >"$EXAMPLE/rootfs.key"
    fi
}

make_rootfs() {
    trap 'rm -f "$1"' ERR
    local customize=()
    [[ ! -f $EXAMPLE/customize.sh ]] || customize=(--customize-hook="$PWD/$EXAMPLE/customize.sh")
    # A fixed time, and no caches, logs and manuals: the same packages make the same image.
    SOURCE_DATE_EPOCH=1700000000 mmdebstrap --quiet --variant=essential --format=tar \
        --include="$PACKAGES" \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --aptopt='APT::Install-Recommends "false"' \
        "${customize[@]}" \
        --customize-hook='rm -rf "$1"/var/log/apt "$1"/var/log/*.log "$1"/var/cache/* "$1"/etc/resolv.conf' \
        --customize-hook=': >"$1/etc/hostname"' \
        "$SUITE" "$1"
}

die() {
    echo "$EXAMPLE: $*" >&2
    exit 1
}

main
