#!/bin/sh
set -eu
# The cluster that the package made: each Machine makes its own, on its volume.
rm -rf "$1"/var/lib/postgresql/15 "$1"/etc/postgresql/15 "$1"/var/log/postgresql
# The compiler of long queries is half of the image, and PostgreSQL does without.
rm -rf "$1"/usr/lib/postgresql/15/lib/bitcode "$1"/usr/lib/postgresql/15/lib/llvmjit* \
    "$1"/usr/lib/x86_64-linux-gnu/libLLVM* "$1"/usr/lib/x86_64-linux-gnu/libz3*
