# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian packages as a user has them: installed by apt, used, upgraded, removed, purged."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from kvmneg import __version__
from tests.packages.errors import PackageError, Unreachable
from tests.units import debian, trees
from tests.units.conftest import Installed
from tests.units.held import VM, guests, holding, stored

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.hosts, pytest.mark.every_host]

SOCKET = "/run/kvmneg/org.kvmneg"
STATE = "/var/lib/kvmneg/kvmneg.sqlite"
CALL = ("kvmneg", "negotiate", "--level", "x86-64-v2")  # asks the daemon
EXAMPLES = "/usr/share/doc/libkvmneg-dev/examples"


class Debian(Installed):
    """A container of sid, with the packages in its /packages."""

    def put(self, packages: Path) -> None:
        shutil.copytree(packages, self.root / "packages", dirs_exist_ok=True)

    def install(self, *names: str, version: str = "") -> str:
        """Install packages as a user does who has fetched them; others by their names. There is no network."""
        version = version or debian.version()
        words = [self._file(name, version) if "kvmneg" in name else name for name in names]
        return self.run("apt-get", "install", "--yes", *words, seconds=300).stdout

    def _file(self, name: str, version: str) -> str:
        which = debian.FIRST if version == debian.version() else debian.NEXT
        (path,) = (self.root / "packages" / which).glob(f"{name}_*.deb")
        return f"/packages/{which}/{path.name}"

    def is_(self, question: str, unit: str) -> str:
        return self.run("systemctl", f"is-{question}", unit, check=False).stdout.strip()

    def lacks(self, path: str) -> bool:
        return bool(self.run("test", "-e", path, check=False).returncode)


@pytest.fixture(scope="session")
def packages(containers: None) -> Path:
    try:
        return debian.packages()
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")


@pytest.fixture(scope="session")
def bare(containers: None) -> Path:
    try:
        return debian.bare()
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")


def booted(lower: Path, packages: Path, folder: Path, suite: str = debian.SUITE) -> Debian:
    one = Debian(suite, folder, kvm=False, lower=str(lower))
    one.put(packages)
    return one


@pytest.fixture
def system(bare: Path, packages: Path, tmp_path: Path) -> Iterator[Debian]:
    """sid with systemd, on which nothing was installed yet."""
    with booted(bare, packages, tmp_path) as one:
        yield one


@pytest.fixture(scope="module")
def installed(bare: Path, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    """The same with all the packages, as nothing but their installation left it; a recorded host is to be served."""
    with booted(bare, packages, tmp_path_factory.mktemp("debian")) as one:
        one.install("kvmneg", *debian.field("Recommends"))
        one.install("libkvmneg0", "libkvmneg-client0", "libkvmneg-dev", "gcc", "libc6-dev", "pkgconf")
        one.serve_recorded()
        yield one


def test_lintian(packages: Path) -> None:
    """Not a word, not even of what is a matter of taste. There are no overrides; README.source would have why."""
    try:
        said = debian.enter(
            debian.building(), packages / debian.FIRST, "lintian", "sh", "-c",
            "lintian --allow-root --pedantic --display-info --fail-on error,warning /build/*.changes",
        )  # fmt: skip
    except PackageError as error:
        pytest.fail(str(error))
    assert not said


def test_lintian_would_tell(tmp_path: Path, containers: None) -> None:
    """It does judge: an empty package has all of its faults."""
    (tmp_path / "x/DEBIAN").mkdir(parents=True)
    (tmp_path / "x/DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: X <x@x.org>\nDescription: x\n", "ascii"
    )
    with pytest.raises(PackageError, match="no-copyright-file"):
        debian.enter(
            debian.building(), tmp_path, "lintian", "sh", "-c",
            "chown -R 0:0 /build && dpkg-deb --build /build/x && lintian --allow-root --fail-on error /build/x.deb",
        )  # fmt: skip


def test_the_library_for_vm_monitors_needs_libc_alone(packages: Path) -> None:
    (package,) = (packages / debian.FIRST).glob("libkvmneg0_*.deb")
    control = debian.enter(
        debian.building(), package.parent, "reading it", "dpkg-deb", "--field", f"/build/{package.name}", "Depends"
    )  # fmt: skip
    assert [one.split()[0] for one in control.split(", ")] == ["libc6"]


class TestInstalled:
    """What the installation alone makes."""

    def test_the_socket_waits_and_the_first_call_starts_the_daemon(self, installed: Debian) -> None:
        assert installed.is_("enabled", "kvmneg.socket") == "enabled"
        assert installed.is_("active", "kvmneg.socket") == "active"
        assert installed.is_("enabled", "kvmneg.service") == "indirect"  # by Also=: its socket is
        assert installed.is_("active", "kvmneg.service") == "inactive"
        assert "x86-64-v2" in installed.run(*CALL, user="nobody").stdout
        assert installed.is_("active", "kvmneg.service") == "active"
        assert installed.main("comm").strip() == "kvmnegd"

    def test_users_and_groups(self, installed: Debian) -> None:
        assert installed.run("id", "--groups", "--name", "kvmneg").stdout.split() == ["kvmneg", "kvm"]
        assert installed.run("getent", "group", "kvmneg-admin").stdout

    def test_it_reloads(self, installed: Debian) -> None:
        """Without procps, which it does not depend on."""
        installed.run("kvmneg", "guests")
        before = installed.main_pid()
        settings = installed.root / "etc/kvmneg/kvmneg.toml"
        settings.parent.mkdir(exist_ok=True)  # nothing but an administrator makes it
        settings.write_text("[limits]\nREASON_CHARACTERS = 20\n")
        installed.run("systemctl", "reload", "kvmneg.service")
        long = ("kvmneg", "fence", "pin", "--from", "host", "--reason", "more than twenty characters")
        refused = "REASON_CHARACTERS"
        installed.wait("the new limit", lambda: refused in installed.run(*long, check=False).stderr)
        settings.unlink()
        assert installed.main_pid() == before

    def test_the_journal_explains(self, installed: Debian) -> None:
        installed.run("kvmneg", "guests")
        words = ("journalctl", "-x", "--no-pager", "--unit", "kvmneg.service")
        installed.wait(
            "that it started", lambda: "Subject: kvmnegd has started" in installed.run(*words).stdout
        )

    def test_every_page_is_found(self, installed: Debian) -> None:
        pages = [path.name.split(".scd")[0] for path in (trees.TOP / "man").glob("*.scd*")]
        assert len(pages) >= 8
        for page in pages:
            name, _, section = page.rpartition(".")
            found = installed.run("man", "-w", section, name).stdout.strip()
            assert found == f"/usr/share/man/man{section}/{page}.gz"
        assert "varlink" in installed.run("man", "8", "kvmnegd").stdout

    def test_the_bus_and_polkit_have_it(self, installed: Debian) -> None:
        words = ("get-property", "org.kvmneg1", "/org/kvmneg1", "org.kvmneg1", "State")
        assert installed.run("busctl", *words).stdout == 's "floating"\n'
        assert "org.kvmneg1.pin" in installed.run("pkaction").stdout

    def test_modules_are_compiled(self, installed: Debian) -> None:
        """The daemon cannot write there, and would compile them again at every start."""
        folder = installed.root / "usr/lib/python3/dist-packages/kvmneg"
        for path in folder.rglob("*.py"):
            assert list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc")), path

    def test_pytest_finds_the_plugin(self, installed: Debian) -> None:
        code = (
            "from importlib.metadata import entry_points, version; (one,) = entry_points(group='pytest11');"
            "print(one.name, one.value, version('kvmneg'))"
        )
        told = installed.run("python3", "-c", code).stdout.split()
        assert told == ["kvmneg", "kvmneg.pytest_plugin", __version__]

    def test_the_example_builds_and_runs(self, installed: Debian) -> None:
        build = (
            f"mkdir /tmp/mine && cp {EXAMPLES}/*.[ch] /tmp/mine && cd /tmp/mine && "
            "cc -Wall -Werror -o minivmm minivmm.c $(pkg-config --cflags --libs libkvmneg-client libkvmneg)"
        )
        installed.run("sh", "-euc", build)
        linked = installed.run("ldd", "/tmp/mine/minivmm").stdout
        for library in ("libkvmneg.so.0", "libkvmneg-client.so.0"):
            assert f"{library} => " in linked and f"{library} => not" not in linked
        done = installed.run(
            "/tmp/mine/minivmm", "not-a-uuid", '{"request": {"level": "x86-64-v9"}}', check=False
        )
        assert done.returncode == 1 and "x86-64-v9" in done.stderr  # the daemon's words

    @pytest.mark.parametrize("name", ["kvmneg", "kvmnegd"])
    def test_completions_are_where_debian_looks(self, installed: Debian, name: str) -> None:
        files = installed.run("dpkg", "-L", "kvmneg").stdout.split()
        assert f"/usr/share/bash-completion/completions/{name}" in files
        assert f"/usr/share/zsh/vendor-completions/_{name}" in files


def test_it_runs_without_what_it_only_recommends(system: Debian) -> None:
    told = system.install("kvmneg")
    assert "python3-sdbus" not in told.replace("Recommended packages", "").split("Setting up", 1)[1]
    system.serve_recorded()
    assert "x86-64-v2" in system.run(*CALL).stdout
    system.wait("why", lambda: "python-sdbus is not installed" in system.journal("kvmneg.service"))


def test_what_sid_built_runs_in_older_suites(suite: str, packages: Path, tmp_path: Path) -> None:
    """The extension module is of the stable ABI, and what they depend on is that old."""
    with booted(trees.tree(suite), packages, tmp_path, suite) as one:
        one.run("dpkg", "--install", one._file("kvmneg", debian.version()))
        one.serve_recorded()
        assert "x86-64-v2" in one.run(*CALL).stdout


def pin(system: Debian) -> None:
    system.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "a test")


def fence(system: Debian) -> dict[str, object]:
    found: dict[str, object] = json.loads(system.run("kvmneg", "--json", "fence", "show").stdout)
    return found


def test_upgraded_in_place(system: Debian) -> None:
    """The fence, its generation, a lease and its connection are as before, and the new daemon has them."""
    system.install("kvmneg")
    system.serve_recorded()
    pin(system)
    with holding(system) as holder:
        before, leases, pid = fence(system), guests(system), system.main_pid()
        assert before["generation"] == 1 and [one["vm"] for one in leases] == [VM] and stored(system) == 1
        socket = system.show("kvmneg.socket", "ActiveEnterTimestampMonotonic")
        system.install("kvmneg", version=debian.next_version())
        assert system.restarted(pid)
        assert holder.do("ask") == debian.next_version()  # on the connection it had
        assert fence(system) == before and guests(system) == leases and stored(system) == 1
        assert system.show("kvmneg.socket", "ActiveEnterTimestampMonotonic") == socket  # it never closed


def test_an_upgrade_starts_no_daemon_that_nobody_called(system: Debian) -> None:
    system.install("kvmneg")
    system.install("kvmneg", version=debian.next_version())
    assert system.is_("active", "kvmneg.socket") == "active"
    assert system.is_("active", "kvmneg.service") == "inactive"


def test_an_upgrade_leaves_a_socket_that_was_disabled(system: Debian) -> None:
    system.install("kvmneg")
    system.run("systemctl", "disable", "--now", "kvmneg.socket")
    system.install("kvmneg", version=debian.next_version())
    assert system.is_("enabled", "kvmneg.socket") == "disabled"
    assert system.is_("active", "kvmneg.socket") == "inactive"


def test_removed_and_purged(system: Debian) -> None:
    system.install("kvmneg")
    system.serve_recorded()
    pin(system)
    before = fence(system)
    settings = system.root / "etc/kvmneg/kvmneg.toml"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text("[limits]\nREASON_CHARACTERS = 20\n")

    system.run("apt-get", "remove", "--yes", "kvmneg", seconds=300)
    units = system.run("systemctl", "list-units", "--all", "--no-legend", "--plain", "kvmneg*").stdout
    assert not [line for line in units.splitlines() if " active " in line], units
    assert system.lacks(SOCKET) and system.lacks("/usr/lib/python3/dist-packages/kvmneg")
    assert not (system.root / "run/varlink/registry/org.kvmneg").is_symlink()
    assert not system.lacks(STATE) and settings.exists()

    system.install("kvmneg")
    assert fence(system) == before  # back where it was

    system.run("apt-get", "purge", "--yes", "kvmneg", seconds=300)
    assert system.lacks("/var/lib/kvmneg") and system.lacks("/etc/kvmneg")
    assert system.run("getent", "passwd", "kvmneg").stdout  # a number is not given to another
    system.install("kvmneg")
    assert not fence(system)["pinned"]
