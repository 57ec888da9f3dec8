#!/usr/bin/env bash
# Makes rootfs.tar: a small Debian with nginx, from Debian's packages alone. Kept under
# ~/.cache/tern/rootfs by what it is made of, so that the second time takes no time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

SUITE=bookworm
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/tern/rootfs

main() {
    command -v mmdebstrap >/dev/null || die "missing program: apt-get install mmdebstrap"
    # A newer nginx in Debian is a reason to make it anew; without apt's lists the last one will do.
    local version key cached
    version=$(apt-cache show --no-all-versions nginx-light 2>/dev/null | sed -n 's/^Version: //p' || true)
    key=$(cat make-rootfs.sh - <<<"$version" | sha256sum | cut -c1-16)
    cached=$CACHE/debian-nginx-$key.tar
    if [[ ! -f $cached ]]; then
        echo "debian-nginx: making a root file system of $SUITE with nginx $version" >&2
        mkdir -p "$CACHE"
        make_rootfs "$cached.$$"
        mv "$cached.$$" "$cached"
    fi
    if [[ $(cat rootfs.key 2>/dev/null) != "$key" || ! -f rootfs.tar ]]; then
        cp --reflink=auto "$cached" rootfs.tar
        echo "$key" >rootfs.key
    fi
}

make_rootfs() {
    trap 'rm -f "$1"' ERR
    # A fixed time, and no caches, logs and manuals: the same packages make the same image.
    SOURCE_DATE_EPOCH=1700000000 mmdebstrap --quiet --variant=essential --format=tar \
        --include=nginx-light \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --aptopt='APT::Install-Recommends "false"' \
        --customize-hook='ln -sf /dev/stdout "$1/var/log/nginx/access.log"' \
        --customize-hook='ln -sf /dev/stderr "$1/var/log/nginx/error.log"' \
        --customize-hook='rm -rf "$1"/var/log/apt "$1"/var/log/*.log "$1"/var/cache/* "$1"/etc/resolv.conf' \
        --customize-hook='mkdir -p "$1/var/cache/nginx"; : >"$1/etc/hostname"' \
        "$SUITE" "$1"
}

die() {
    echo "debian-nginx: $*" >&2
    exit 1
}

main "$@"
