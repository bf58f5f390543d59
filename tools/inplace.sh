#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Builds in build/ and copies the extension and the compiled catalogue beside the sources, so that
# `PYTHONPATH=. python -m kvmneg…` runs the checkout itself. The copies are in .gitignore.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
# One at a time: two builds in one directory spoil each other.
exec 9>build/.inplace.lock
flock 9
# The venv's cffi and meson before the system's.
[ -d .venv/bin ] && PATH="$PWD/.venv/bin:$PATH"

# Set up again every time: files come and go, and setting up is what looks for them.
if [ -f build/meson-private/coredata.dat ]; then
    meson setup --reconfigure build >/dev/null
else
    meson setup build
fi
# The extension first: it is of use even while a table of the catalogue is being edited and does not compile.
# New files under the old names: writing into an extension that a process has mapped would crash it.
put() { cp -p "$1" "$2/.$(basename "$1")" && mv "$2/.$(basename "$1")" "$2/$(basename "$1")"; }
ninja -C build "kvmneg/$(basename build/kvmneg/_libkvmneg*.so.p .p)"
for extension in build/kvmneg/_libkvmneg*.so; do
    put "$extension" kvmneg
done
ninja -C build
for module in build/kvmneg/_{x86_64,arm64}{,_names}.py; do
    put "$module" kvmneg/features/catalog
done
