#!/usr/bin/busybox sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# shellcheck shell=sh
# PID 1 of an emulated host: file systems, modules, then agent.py, which takes jobs (see its words).
b=/usr/bin/busybox
$b mkdir -p /proc /sys /dev /tmp /run /root /job
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b mkdir -p /dev/pts /dev/shm
$b mount -t devpts devpts /dev/pts
$b mount -t tmpfs tmpfs /dev/shm
$b mount -t tmpfs tmpfs /tmp
$b mount -t securityfs securityfs /sys/kernel/security
$b chmod 1777 /tmp /dev/shm
for module in /modules/*.ko; do
    $b insmod "$module" 2>/dev/null || echo "not loaded: $module" >/dev/kmsg
done
$b ip link set lo up
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
case " $($b cat /proc/cmdline) " in
    *" kvmneg.shell "*) $b setsid $b cttyhack $b sh ;;
    *) /usr/bin/python3 -SE /agent.py ;;
esac
$b poweroff -f
