#!/bin/busybox sh
# First program of the virtual host: puts the root file system together and hands over to
# `tern-metal init`. /dev/vda is the read-only root; /dev/vdb, made for this start alone, takes all
# writes: the overlay's upper layer, /tmp and /var/lib/tern (not on the overlay, but on ext4 itself,
# where fsync, O_DIRECT, O_TMPFILE and holes are those of a real server).
b=/bin/busybox

event() { echo "$1" > /dev/ttyS1; }
uptime_now() { read -r now _ < /proc/uptime; echo "$now"; }
phase() { event "{\"event\":\"phase\",\"name\":\"$1\",\"uptime\":$(uptime_now)}"; }
fail() { event "{\"event\":\"failed\",\"message\":\"$1\"}"; $b poweroff -f; }

$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
phase kernel

while read -r module; do
    $b insmod "/modules/$module" || fail "kernel module $module does not load"
done < /modules/order

$b mount -t erofs -o ro /dev/vda /lower || fail "the root disk does not mount"
$b mount -t ext4 -o noatime,noinit_itable,discard /dev/vdb /data || fail "the data disk does not mount"
$b mkdir /data/upper /data/work /data/tmp /data/tern
$b chmod 1777 /data/tmp
$b mount -t overlay -o lowerdir=/lower,upperdir=/data/upper,workdir=/data/work overlay /root ||
    fail "the root overlay does not mount"
$b mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs /root/run
$b mkdir -p /root/run/tern-metal /root/var/lib/tern
$b mv /tern-metal /plan.json /root/run/tern-metal/
$b mount -o bind /data/tmp /root/tmp
$b mount -o bind /data/tern /root/var/lib/tern
for tree in dev proc sys; do
    $b mount -o move /$tree /root/$tree
done
exec $b switch_root /root /run/tern-metal/tern-metal init --plan /run/tern-metal/plan.json
