# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m kvmneg.cli` is `kvmneg`."""

import sys

from kvmneg.cli import main

sys.exit(main())
