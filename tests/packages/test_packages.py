# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages side by side, from an archive made here: signed by a key of its own, served on loopback."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib
import importlib.util
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from tests.packages import archive, errors, store, tree, versions
    from tests.packages.tree import Tree
else:
    if "kvmneg_packages" not in sys.modules:  # tests are imported without their folders on the path
        here = Path(__file__).parent
        spec = importlib.util.spec_from_file_location(
            "kvmneg_packages", here / "__init__.py", submodule_search_locations=[str(here)]
        )
        sys.modules["kvmneg_packages"] = importlib.util.module_from_spec(spec)
    archive, errors, store, tree, versions = (
        importlib.import_module(f"kvmneg_packages.{name}")
        for name in ("archive", "errors", "store", "tree", "versions")
    )

NEEDED = ("apt-get", "dpkg-deb", "gpg", "tar")
HELLO = store.Wanted("hello", "2.0", "stable")


class Made(NamedTuple):
    """An archive made for a test: its folder, its address, and the keyring that verifies it."""

    folder: Path
    archive: archive.Archive
    home: Path

    @property
    def release(self) -> Path:
        return self.folder / "dists/stable"

    @property
    def packages(self) -> Path:
        return self.release / "main/binary-amd64/Packages.gz"

    def sign(self) -> None:
        """Write Release anew for the index as it is, and sign it."""
        data = self.packages.read_bytes()
        listed = "".join(
            f" {hashlib.sha256(content).hexdigest()} {len(content)} main/binary-amd64/{name}\n"
            for name, content in (("Packages.gz", data), ("Packages", gzip.decompress(data)))
        )
        text = (
            "Suite: stable\nCodename: stable\nDate: Sat, 01 Aug 2026 00:00:00 UTC\nArchitectures: amd64\n"
            f"Components: main\nSHA256:\n{listed}"
        )
        _gpg(self.home, "--clearsign", "--output", str(self.release / "InRelease"), text=text)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def _gpg(home: Path, *words: str, text: str = "") -> None:
    command = ["gpg", "--homedir", str(home), "--batch", "--yes", "--quiet", "--passphrase", "", *words]
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)


def _package(folder: Path, name: str, version: str, depends: str, files: dict[str, str]) -> str:
    """Build a .deb into folder/pool; its entry of the index."""
    root = folder / "build" / f"{name}_{version}"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        (root / path).chmod(0o755)
    (root / "DEBIAN").mkdir()
    needs = f"Depends: {depends}\n" if depends else ""
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: none\n{needs}Description: x\n"
    )
    (root / "DEBIAN/control").write_text(control)
    (folder / "pool").mkdir(exist_ok=True)
    file = folder / f"pool/{name}_{version}_amd64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, file], check=True, capture_output=True)
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return f"{control}Filename: pool/{file.name}\nSize: {len(data)}\nSHA256: {digest}\n\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive's files and its key, made once."""
    for tool in NEEDED:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    top = tmp_path_factory.mktemp("archive")
    home, folder = top / "gnupg", top / "debian"
    home.mkdir(mode=0o700)
    entries = [
        _package(top, "hello", "2.0.7-1", "greeting (>= 1)", {"usr/bin/hello": '#!/bin/sh\necho "$@"\n'}),
        # a package of before the merge of /usr: its /lib is a directory
        _package(top, "greeting", "1.0-1", "", {"lib/greeting/text": "hello\n"}),
        _package(top, "unrelated", "1.0-1", "", {"usr/share/unrelated": "x\n"}),
    ]
    index = folder / "dists/stable/main/binary-amd64/Packages.gz"
    index.parent.mkdir(parents=True)
    index.write_bytes(gzip.compress("".join(entries).encode()))
    (top / "pool").rename(folder / "pool")
    _gpg(home, "--quick-generate-key", "Test archive <test@localhost>", "rsa2048", "sign", "never")
    _gpg(home, "--export", "--output", str(top / "keyring.gpg"))
    Made(folder, archive.Archive("", ""), home).sign()
    return top


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Iterator[Made]:
    """A copy of the archive that a test may damage, served on loopback."""
    folder = tmp_path / "debian"
    shutil.copytree(original / "debian", folder)
    handler = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield Made(folder, archive.Archive(address, str(original / "keyring.gpg")), original / "gnupg")
        server.shutdown()
        thread.join()


def test_a_package_comes_with_what_it_depends_on(made: Made, tmp_path: Path) -> None:
    packages = store.Store(tmp_path / "cache", made.archive)
    tree = packages.get(HELLO)
    assert (tree.package, tree.version) == ("hello", "2.0.7-1")
    assert sorted(tree.packages) == ["greeting_1.0-1_amd64.deb", "hello_2.0.7-1_amd64.deb"]
    assert tree.path("usr/bin/hello").is_file()
    assert (tree.root / "usr/lib/greeting/text").read_text() == "hello\n", "/lib is a link below /usr"
    assert tree.path("lib/greeting/text").is_file()
    assert not (tree.root / "usr/share/unrelated").exists()
    wrapper = tree.wrapper(["sh", str(tree.path("usr/bin/hello")), "a b"], tmp_path / "wrapper")
    said = subprocess.run([wrapper, "c  d"], capture_output=True, text=True, check=True).stdout
    assert said == "a b c  d\n"


def test_a_package_alone_comes_without(made: Made, tmp_path: Path) -> None:
    packages = store.Store(tmp_path / "cache", made.archive)
    tree = packages.get(HELLO._replace(alone=True))
    assert tree.packages == ["hello_2.0.7-1_amd64.deb"]
    assert packages.cached(HELLO) is None, "whoever wants the dependencies too is not served with this"
    assert packages.cached(HELLO._replace(alone=True)) == tree


@pytest.fixture
def linked(tmp_path: Path) -> Tree:
    """A tree whose links say, beside the ordinary, what leads out of it or nowhere."""
    root = tmp_path / "root"
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/linker-1").touch()
    links = {
        "lib": "usr/lib",
        "lib64": "/usr/lib",
        "usr/lib/linker": "/lib64/linker-1",
        "usr/lib/above": "../../../../../usr/lib/linker",
        "usr/lib/circle": "circle",
        "usr/lib/outside": str(tmp_path / "outside"),
    }
    (tmp_path / "outside").touch()
    for name, target in links.items():
        (root / name).symlink_to(target)
    return tree.Tree(root, "hello", "2.0", "stable", "amd64", alone=False, packages=[])


@pytest.mark.parametrize("name", ["lib64/linker", "/lib/linker", "usr/lib/above", "lib/../lib/linker-1"])
def test_links_are_followed_within_the_tree(name: str, linked: Tree) -> None:
    """A link to an absolute path is one from the tree's root: the installed system has such a file too."""
    assert linked.path(name) == linked.root / "usr/lib/linker-1"


@pytest.mark.parametrize("name", ["lib/circle", "lib/outside", "lib/none"])
def test_links_out_of_the_tree_lead_to_nothing(name: str, linked: Tree) -> None:
    with pytest.raises(errors.PackageError, match=f"hello 2.0 has no {name}"):
        linked.path(name)


def test_what_is_cached_needs_no_mirror(made: Made, tmp_path: Path) -> None:
    tree = store.Store(tmp_path / "cache", made.archive).get(HELLO)
    elsewhere = made.archive._replace(mirror="http://127.0.0.1:9")
    assert store.Store(tmp_path / "cache", elsewhere).get(HELLO) == tree
    with pytest.raises(errors.Unreachable, match="reading the index"):
        store.Store(tmp_path / "other", elsewhere).get(HELLO)


def test_the_nearest_version_stands_in_and_says_so(made: Made, tmp_path: Path) -> None:
    tree = store.Store(tmp_path / "cache", made.archive).get(HELLO._replace(version="1.9"))
    assert tree.version == "2.0.7-1"
    assert not versions.satisfies(tree.version, "1.9")
    with pytest.raises(errors.Missing, match=r"hello 1\.9 of stable: the suite has 2\.0\.7-1"):
        store.Store(tmp_path / "cache", made.archive).get(HELLO._replace(version="1.9"), exact=True)


def test_a_missing_package_is_named(made: Made, tmp_path: Path) -> None:
    with pytest.raises(errors.Missing, match="no goodbye"):
        store.Store(tmp_path / "cache", made.archive).get(HELLO._replace(package="goodbye"))


def test_a_missing_suite_is_an_error_of_the_index(made: Made, tmp_path: Path) -> None:
    with pytest.raises(errors.PackageError, match="reading the index"):
        store.Store(tmp_path / "cache", made.archive).get(HELLO._replace(suite="nowhere"))


def _finished(cache: Path) -> list[str]:
    return [path.name for path in (cache / "trees").glob("*")]


def test_a_package_that_was_changed_is_refused(made: Made, tmp_path: Path) -> None:
    file = made.folder / "pool/hello_2.0.7-1_amd64.deb"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        errors.PackageError, match=r"(?i)fetching hello=2\.0\.7-1 of stable.*hash sum mismatch"
    ):
        store.Store(tmp_path / "cache", made.archive).get(HELLO)
    assert _finished(tmp_path / "cache") == []


def test_an_index_that_was_changed_is_refused(made: Made, tmp_path: Path) -> None:
    text = gzip.decompress(made.packages.read_bytes()).replace(b"2.0.7-1", b"2.0.8-1")
    made.packages.write_bytes(gzip.compress(text))
    with pytest.raises(errors.PackageError, match="reading the index"):
        store.Store(tmp_path / "cache", made.archive).get(HELLO)


def test_a_release_signed_by_another_key_is_refused(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "gnupg"
    other.mkdir(mode=0o700)
    _gpg(other, "--quick-generate-key", "Somebody else <else@localhost>", "rsa2048", "sign", "never")
    made._replace(home=other).sign()
    with pytest.raises(errors.PackageError, match=r"(?i)reading the index.*(not signed|NO_PUBKEY)"):
        store.Store(tmp_path / "cache", made.archive).get(HELLO)


def test_without_a_keyring_nothing_is_fetched(made: Made, tmp_path: Path) -> None:
    without = made.archive._replace(keyring=str(tmp_path / "none.gpg"))
    with pytest.raises(errors.PackageError, match=r"none\.gpg is missing"):
        store.Store(tmp_path / "cache", without).get(HELLO)


def test_what_a_dead_process_left_is_swept_and_made_anew(made: Made, tmp_path: Path) -> None:
    left = tmp_path / "cache/trees/.new-left"
    left.mkdir(parents=True)
    half = tmp_path / "cache/trees" / store._folder(HELLO, "2.0.7-1") / "root"
    half.mkdir(parents=True)
    tree = store.Store(tmp_path / "cache", made.archive).get(HELLO)
    assert tree.path("usr/bin/hello").is_file()
    assert not left.exists()


def test_those_who_want_it_at_once_share_one(made: Made, tmp_path: Path) -> None:
    def get(_: int) -> Tree:
        return store.Store(tmp_path / "cache", made.archive).get(HELLO)

    with ThreadPoolExecutor(4) as pool:
        trees = list(pool.map(get, range(4)))
    assert trees == [trees[0]] * 4
    assert len(_finished(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [
        (["1:10.0.13+ds-0+deb13u1"], "10.0", "1:10.0.13+ds-0+deb13u1"),
        (["1:11.1.3+ds-1", "1:10.0.13+ds-0"], "10.0", "1:10.0.13+ds-0"),
        (["1:9.2.1-1", "1:9.10.0-1"], "9", "1:9.10.0-1"),
        (["1:11.1.3-1", "1:10.2.0-1"], "10.1", "1:10.2.0-1"),
        (["1:8.0.0-1", "1:9.1.0-1"], "10.1", "1:9.1.0-1"),
        (["1:8.0.0-1"], "", "1:8.0.0-1"),
        ([], "10.1", None),
    ],
)
def test_the_nearest_version(available: list[str], wanted: str, expected: str | None) -> None:
    assert versions.nearest(available, wanted) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("sources.list", "deb http://mirror.example/debian trixie main\n", "http://mirror.example/debian"),
        ("sources.list", "# deb http://old.example/debian trixie main\n", archive.DEFAULT_MIRROR),
        ("sources.list", "deb https://other.example/tools stable main\n", archive.DEFAULT_MIRROR),
        (
            "sources.list.d/debian.sources",
            "Types: deb\n# URIs: http://no.example/debian\nURIs: https://a.example/debian/\nSuites: trixie\n",
            "https://a.example/debian",
        ),
        (
            "sources.list.d/old.list.save",
            "deb http://no.example/debian trixie main\n",
            archive.DEFAULT_MIRROR,
        ),
    ],
)
def test_the_mirror_is_the_one_of_this_systems_sources(
    name: str, text: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert archive.find_archive(tmp_path) == archive.Archive(expected, archive.KEYRING)
