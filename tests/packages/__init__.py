# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian packages side by side: other QEMUs, libvirts and kernels beside the installed ones, without installing.

    archive.find_archive()                        the mirror and keyring that this system's apt uses
    archive.Suite(…).update() / .candidates()     one suite's signed index, through a private apt
    store.Store().get(Wanted("qemu-system-x86", "10.0", "trixie"))   an unpacked tree, from the cache or the mirror
    Tree.command("usr/bin/qemu-system-x86_64")    the words to run a program of the tree with

apt does what apt does best: it verifies InRelease against the keyring, every index against InRelease and every
package against its index, and refuses what is not signed. It gets directories of its own below the cache, so
the system's lists, sources, configuration and packages are neither read nor touched, and no root is needed.
"""
