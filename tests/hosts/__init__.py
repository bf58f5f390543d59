# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts with a real KVM of their own, emulated: kernels and CPUs that the machine underneath is not.

    catalogue.find("arm64-6.12")           which hosts there are
    hosts.start(host) → Machine            a booted (or restored) host
    machine.run(Job(["pytest", …]))        a job in, its exit status, output and files out

Below ${XDG_CACHE_HOME:-~/.cache}/kvmneg/hosts lie what is made once: initramfs, compiled modules, snapshots.
A lock guards each of them; no privilege is needed, and nothing of the machine's own KVM is touched.
"""
