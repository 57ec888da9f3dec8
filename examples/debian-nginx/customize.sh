#!/bin/sh
# Its logs are the Machine's.
set -eu
ln -sf /dev/stdout "$1/var/log/nginx/access.log"
ln -sf /dev/stderr "$1/var/log/nginx/error.log"
