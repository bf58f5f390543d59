# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the daemon keeps what must outlive it: the fence, contracts and grants, reports.

`interface` is what every store offers, `sqlite` the embedded one. Only the daemon imports these modules:
everything else asks the daemon.
"""
