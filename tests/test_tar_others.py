"""Every other tar reads back what is written here; what they write, is read here."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tars import described, hard_links_alike, run, tar_of, whole_seconds
from trees import ACCESS_ACL, DEFAULT_ACL, Entry, describe, differences, make_beyond_path_max, make_every_kind

# --- GNU tar, bsdtar -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("every") / "kind"
    make_every_kind(root)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_gnu_tar_extracts_every_kind_of_entry_we_write(tree: Path, tmp_path: Path, locale: str) -> None:
    """A repository without backupd: `zstd -d | tar x` brings back everything, holes and attributes too."""
    run(
        "tar", "-C", tmp_path, "-xp", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-f", "-",
        stdin=tar_of(tree), locale=locale,
    )  # fmt: skip
    assert differences(describe(tree), describe(tmp_path)) == []


def test_gnu_tar_restores_acls_whether_or_not_it_is_told_acls(tree: Path, tmp_path: Path) -> None:
    """ACLs travel as the attribute that Linux keeps; --acls must not wipe them."""
    argv = ("tar", "-C", tmp_path, "-xp", "--acls", "--xattrs", "--xattrs-include=*", "-f", "-")
    run(*argv, stdin=tar_of(tree))
    assert os.getxattr(tmp_path / "attributes" / "acl", "system.posix_acl_access") == ACCESS_ACL
    assert os.getxattr(tmp_path / "attributes" / "directory", "system.posix_acl_default") == DEFAULT_ACL


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_bsdtar_extracts_every_kind_of_entry_we_write(tree: Path, tmp_path: Path, locale: str) -> None:
    """libarchive guesses at charsets where GNU tar does not: names come back byte for byte all the same."""
    run("bsdtar", "-C", tmp_path, "-xpf", "-", "--numeric-owner", stdin=tar_of(tree), locale=locale)
    before, after = describe(tree), describe(tmp_path)
    # Three things bsdtar 3.6 does not do: the time of the directory it extracts into, fractions of seconds
    # before 1970, and GNU tar's way to quote an attribute's name.
    for path, key in ((".", "mtime"), ("times/1969", "mtime")):
        before[path].pop(key)
        after[path].pop(key)
    for path in ("attributes/plain", "attributes/linked"):
        for entry in (before[path], after[path]):
            attributes = cast("dict[str, bytes]", entry["xattrs"])
            entry["xattrs"] = {key: value for key, value in attributes.items() if "odd" not in key}
    assert differences(before, after) == []


# --- what other tars write ------------------------------------------------------------------------------


def seen_by_tar(tree: Path, *options: str) -> dict[str, Entry]:
    argv = [
        "tar",
        "-C",
        str(tree),
        "-c",
        "--numeric-owner",
        "--exclude=./special/socket",
        *options,
        "-f",
        "-",
        ".",
    ]
    return described(run(*argv))


XATTRS = ("--xattrs", "--xattrs-include=*")


@pytest.mark.parametrize("sparse_version", ["0.0", "0.1", "1.0"])
@pytest.mark.parametrize("acls", [(), ("--acls",)])
def test_a_pax_tar_of_gnu_is_read_whole(tree: Path, sparse_version: str, acls: tuple[str, ...]) -> None:
    """Every kind of entry, every form of sparse file, with ACLs as attributes and as text."""
    seen = seen_by_tar(tree, "--format=pax", *XATTRS, *acls, "--sparse", f"--sparse-version={sparse_version}")
    assert differences(hard_links_alike(describe(tree)), hard_links_alike(seen)) == []


def test_an_acl_that_only_stands_as_text_is_read(tree: Path) -> None:
    """`tar --acls` without --xattrs."""
    seen = seen_by_tar(tree, "--format=pax", "--acls")
    assert seen["attributes/acl"]["xattrs"] == {"system.posix_acl_access": ACCESS_ACL}
    assert seen["attributes/directory"]["xattrs"] == {
        "system.posix_acl_access": ACCESS_ACL,
        "system.posix_acl_default": DEFAULT_ACL,
    }


@pytest.mark.parametrize("form", ["gnu", "oldgnu"])
def test_a_gnu_tar_of_gnu_is_read_whole(tree: Path, form: str) -> None:
    """Long names in L and K, large numbers in base 256, sparse files of type S; no attributes."""
    seen = seen_by_tar(tree, f"--format={form}", "--sparse")
    before = whole_seconds(hard_links_alike(describe(tree)))
    assert differences(before, whole_seconds(hard_links_alike(seen)), ignore=("xattrs",)) == []


def test_a_tar_of_bsdtar_is_read_whole(tree: Path) -> None:
    """libarchive writes attributes twice, ACLs with names and numbers, and has its own view of `=`."""
    argv = ("bsdtar", "-C", tree, "-c", "--format=pax", "--xattrs", "--acls", "--numeric-owner")
    seen = described(run(*argv, "--exclude", "./special/socket", "-f", "-", "."))
    before = hard_links_alike(describe(tree))
    before["attributes/directory/heir"]["mode"] = (
        "0o654"  # where an ACL hides the group's bits, bsdtar looks there
    )
    assert differences(before, hard_links_alike(seen), ignore=("sparse", "xattrs", "mtime")) == []
    assert seen["attributes/acl"]["xattrs"] == {"system.posix_acl_access": ACCESS_ACL}
    assert seen["attributes/large"]["xattrs"] == before["attributes/large"]["xattrs"]
    assert seen["many/0/file-000.txt"]["mtime"] == before["many/0/file-000.txt"]["mtime"]


def test_a_tar_of_python_is_read_whole(tree: Path) -> None:
    """The third writer that users meet."""
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            tar.add(tree, ".")
        before = whole_seconds(hard_links_alike(describe(tree)))
        after = whole_seconds(hard_links_alike(described(file.getvalue())))
        before.pop("times/1969")  # Python cuts the fraction of a negative time off towards zero
        after.pop("times/1969")
        assert differences(before, after, ignore=("xattrs", "sparse")) == []


def test_a_file_beyond_4096_bytes_of_path_is_read(tmp_path: Path) -> None:
    """GNU tar reaches such files by directory handles; the format has no limit."""
    make_beyond_path_max(tmp_path / "deep")
    try:
        seen = described(run("tar", "-C", tmp_path / "deep", "-c", "--format=pax", "-f", "-", "."))
        assert len(seen) == 22
        assert max(map(len, seen)) > 5000
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)
