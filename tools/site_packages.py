# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which folder below a prefix the Python that runs this looks in for packages: `make install` asks the one that will
run the commands. Debian's looks in /usr/lib/python3/dist-packages and in /usr/local/lib/python3.N/dist-packages.

site_packages.py PREFIX   prints the folder; ends with 1 and a hint where it looks in none
"""

import site
import sys


def main() -> int:
    prefix = sys.argv[1].rstrip("/")
    found = [path for path in site.getsitepackages() if path.startswith(f"{prefix}/lib")]
    if not found:
        sys.stderr.write(
            f"{sys.executable} looks for packages in {' and '.join(site.getsitepackages())}, none of them below "
            f"{prefix}/lib: the installed commands would not find theirs. Give make another PREFIX= or RUN_PYTHON=\n"
        )
        return 1
    sys.stdout.write(f"{found[0]}\n")
    return 0


sys.exit(main())
