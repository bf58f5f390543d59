# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build-time only: one file of the .dist-info folder that an install without pip gets, on standard output; meson asks.

With it pytest finds the plugin, and importlib.metadata and pip the package. It names no dependencies: a distribution
resolves its own, by its own names.

dist_info.py METADATA|entry_points.txt
"""

import sys
import tomllib
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def metadata(project: dict[str, str]) -> str:
    """The core metadata (packaging.python.org, "Core metadata specifications")."""
    lines = {
        "Metadata-Version": "2.4",
        "Name": project["name"],
        "Version": project["version"],
        "Summary": project["description"],
        "License-Expression": project["license"],
        "Requires-Python": project["requires-python"],
    }
    return "".join(f"{name}: {value}\n" for name, value in lines.items())


def entry_points(project: dict[str, dict[str, dict[str, str]]]) -> str:
    """Those of others' programs; the commands are files of their own."""
    return "".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    )


def main() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]
    sys.stdout.write({"METADATA": metadata, "entry_points.txt": entry_points}[sys.argv[1]](project))


main()
