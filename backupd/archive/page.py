"""Index pages: slices of a tree's index, as JSON. FORMAT.md describes every field.

    {"packs": ["<point-id>/<nnnn>", ...],
     "dirs": [[path, own, [member, ...]], ...]}

`own` and `member` are rows: [name, mode, size, mtime_ns, ctime_ns, inode, uid, gid, links, content, extra?].
`own` describes the directory itself (its name is empty) and is null where a directory's block was cut in two.
`content` is, for a file, triples of numbers (pack, first blob, blobs), one after another; for a symlink its target;
else null. `extra` holds what few entries have: xattrs (base64), device, hardlink, sparse, changed.
Undecodable bytes in names are lone surrogates (PEP 383), escaped in the JSON.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from backupd.errors import Damaged

Row: TypeAlias = "list[Any]"
"""One member; the columns below."""

NAME, MODE, SIZE, MTIME, CTIME, INODE, UID, GID, LINKS, CONTENT, EXTRA = range(11)

Pieces: TypeAlias = "list[list[Any]]"
"""Where content lies while it is being written: [pack name, first blob, blobs], neighbours merged."""
Content: TypeAlias = "list[Any]"
"""A file's content on its way: pieces, and among them lists of Pieces that fill while their blobs are placed."""


class Page(NamedTuple):
    """Decoded."""

    packs: list[str]
    dirs: list[tuple[str, Row | None, list[Row]]]


def encode_page(dirs: Sequence[tuple[str, Row | None, Sequence[Row]]]) -> tuple[bytes, list[str]]:
    """JSON bytes, and the names of the packs that its content lies in. A file's CONTENT is Pieces."""
    numbers: dict[str, int] = {}
    blocks = []
    for path, own, rows in dirs:
        out = []
        for row in rows:
            content = row[CONTENT]
            if type(content) is list:
                flat: list[int] = []
                for pack, first, count in _placed(content):
                    number = numbers.get(pack)
                    if number is None:
                        number = numbers[pack] = len(numbers)
                    flat += (number, first, count)
                row = [*row[:CONTENT], flat, *row[EXTRA:]]  # noqa: PLW2901
            out.append(row)
        blocks.append([path, own, out])
    packs = list(numbers)
    return json.dumps({"packs": packs, "dirs": blocks}, separators=(",", ":")).encode(), packs


def _placed(content: Content) -> Iterator[list[Any]]:
    for piece in content:
        if type(piece[0]) is list:
            yield from piece
        else:
            yield piece


def decode_page(data: bytes) -> Page:
    """Raises Damaged."""
    try:
        page = json.loads(data)
        packs = page["packs"]
        dirs = [(path, own, rows) for path, own, rows in page["dirs"]]
        for path, own, rows in dirs:
            _check_path(path)
            for row in rows if own is None else [own, *rows]:
                if len(row) not in (CONTENT + 1, EXTRA + 1):
                    raise ValueError("a row has the wrong length")
                if row is not own:
                    _check_name(row[NAME])
                if len(row) > EXTRA and "hardlink" in row[EXTRA]:
                    _check_path(row[EXTRA]["hardlink"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Damaged(f"an index page cannot be read: {error}") from None
    return Page(packs, dirs)


def pieces_of(row: Row, packs: Sequence[str]) -> Pieces:
    """A decoded file's content in the form that is written."""
    flat = row[CONTENT] or []
    return [[packs[flat[i]], flat[i + 1], flat[i + 2]] for i in range(0, len(flat), 3)]


def extra_of(row: Row) -> dict[str, Any]:
    return row[EXTRA] if len(row) > EXTRA else {}


def encode_xattrs(xattrs: dict[bytes, bytes]) -> dict[str, str]:
    """As EXTRA holds them."""
    return {os.fsdecode(name): base64.b64encode(value).decode() for name, value in xattrs.items()}


def xattrs_of(row: Row) -> dict[bytes, bytes]:
    found = extra_of(row).get("xattrs", {})
    return {os.fsencode(name): base64.b64decode(value) for name, value in found.items()}


def is_file(row: Row) -> bool:
    """A regular file with content of its own (a hard link's other names have none)."""
    return stat.S_ISREG(row[MODE]) and "hardlink" not in extra_of(row)


def _check_name(name: str) -> None:
    # What lands on disk must never leave the directory it is restored into, whatever a damaged or forged page says.
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a name")


def _check_path(path: str) -> None:
    if path and ("\0" in path or any(part in ("", ".", "..") for part in path.split("/"))):
        raise ValueError(f"{path!r} is not a path")
