#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Prints the first Python of at least 3.11 that is there; python3 where there is none yet (tools/setup.sh installs it).
for python in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
    if command -v "$python" >/dev/null &&
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "$python"
        exit 0
    fi
done
echo python3
