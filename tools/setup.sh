#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# tools/setup.sh run|install|test|hosts: the Debian packages that `make run`, `make install`, `make test` or
# `make test-hosts` needs. As root it installs what is missing; as anyone else it prints the one line that does, and stops.
set -euo pipefail

case $(dpkg --print-architecture 2>/dev/null || true) in
    amd64) qemu='qemu-system-x86' ;;
    arm64) qemu='qemu-system-arm' ;;
    *) echo "kvmneg is set up on Debian 12 or 13, amd64 or arm64; elsewhere install the packages of $0 by hand." >&2; exit 0 ;;
esac
# python3-dev, gcc: the extension; libsystemd-dev, pkg-config: systemd-python, which PyPI has as source only
packages=(python3 python3-venv python3-dev gcc libc6-dev pkg-config libsystemd-dev "$qemu")
case ${1:-} in
    test | hosts)
        packages+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user scdoc mandoc shellcheck procps g++ gpg gpg-agent gpgv apt-utils libjson-c-dev)
        packages+=(dbus) # a private bus
        packages+=(clang libclang-rt-dev) # the fuzzers of tests/fuzz
        packages+=(mmdebstrap) # the containers of tests/units
        packages+=(zsh bash-completion) # completions at a terminal
        packages+=(systemd) # journalctl reads the message catalogue, busctl calls
        # the hosts of tests/hosts, of either architecture
        packages+=(qemu-system-arm qemu-system-x86)
        ;;
    run) ;;
    # libkvmneg-client, the pages; and what the installed commands import
    install) packages+=(libjson-c-dev scdoc python3-cffi-backend python3-systemd) ;;
    *) echo "usage: $0 run|install|test|hosts" >&2; exit 2 ;;
esac

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
missing=()
for package in "${packages[@]}"; do
    installed "$package" || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "Some Debian packages are missing. Install them, then call make again:" >&2
    echo "  sudo apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
fi
echo "Debian packages (once): ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    echo "apt-get could not install: ${missing[*]}" >&2
    exit 1
fi
