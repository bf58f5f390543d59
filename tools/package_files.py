# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build-time only: which files of kvmneg/ are installed, one per line, relative to kvmneg/; meson asks.

package_files.py                   the package: modules, py.typed and the data read at run time
package_files.py --catalogue x86   the tables of one architecture's catalogue, which are compiled instead
"""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "kvmneg"
CATALOGUE = PACKAGE / "features" / "catalog"
DATA = ("py.typed", "service/**/*.varlink", "policy/definitions/**/*.toml", "data/**/*")


def package() -> list[Path]:
    """Every module but the generated ones, which `tools/inplace.sh` may have left here, and the data."""
    generated = {path for path in CATALOGUE.glob("_*.py") if path.name != "__init__.py"}
    modules = {path for path in PACKAGE.rglob("*.py") if path not in generated}
    data = {path for pattern in DATA for path in PACKAGE.glob(pattern)}
    return [path for path in modules | data if path.is_file() and "__pycache__" not in path.parts]


def main() -> None:
    paths = (CATALOGUE / sys.argv[2]).glob("*.toml") if sys.argv[1:2] == ["--catalogue"] else package()
    for path in sorted(paths):
        sys.stdout.write(f"{path.relative_to(PACKAGE).as_posix()}\n")


if __name__ == "__main__":
    main()
