# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside a container: a VM monitor that keeps a lease by its connection. Words come by lines, answers go by lines.

begin UUID    negotiate and begin a contract, held by this connection; its digest
ask           a call on the same connection; the daemon's version
close         close the connection and stay; "closed"
"""

import sys

from kvmneg.client import Client


def main() -> None:
    client = Client(timeout=30)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "begin":
            offer = client.negotiate({"level": "x86-64-v2"})
            print(client.begin(offer["digest"], rest[0], hold=True)["path"], flush=True)
        elif word == "ask":
            print(client.get_info()["version"], flush=True)
        else:
            client.close()
            print("closed", flush=True)


main()
