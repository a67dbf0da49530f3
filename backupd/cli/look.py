"""`backupd ls`, `backupd cat`, `backupd export`: looking into a recovery point."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import click

from backupd.cli.options import Session, command
from backupd.cli.output import note, print_json, printable, size, watching
from backupd.errors import NoRecoveryPoint, UsageError
from backupd.model import Member, MemberType

_LETTERS = {
    MemberType.FILE: stat.S_IFREG,
    MemberType.DIRECTORY: stat.S_IFDIR,
    MemberType.SYMLINK: stat.S_IFLNK,
    MemberType.HARDLINK: stat.S_IFREG,
    MemberType.FIFO: stat.S_IFIFO,
    MemberType.CHARACTER_DEVICE: stat.S_IFCHR,
    MemberType.BLOCK_DEVICE: stat.S_IFBLK,
}


@command("ls", short_help="What is in a recovery point.")
@click.argument("point")
@click.argument("path", required=False, default="")
@click.option("-r", "--recursive", is_flag=True, help="Everything below PATH, not one level.")
def ls_command(session: Session, point: str, path: str, recursive: bool) -> int:
    """What is in a recovery point. POINT is an id or its beginning, or SOURCE for the newest of it."""
    archive = session.agent.open(point)
    inside = path.strip("/")
    shown = [m for m in archive.members() if _is_below(m.name, inside, recursive=recursive)]
    if inside and not shown:
        raise NoRecoveryPoint(
            f"there is no {path!r} in the point {archive.point.id}", hint="`backupd ls -r POINT` shows all"
        )
    if session.json:
        print_json(shown)
        return 0
    for member in shown:
        print(printable(_line(member)))
    return 0


def _is_below(name: str, inside: str, *, recursive: bool) -> bool:
    if not inside:
        return recursive or "/" not in name
    return name == inside or (
        name.startswith(inside + "/") and (recursive or "/" not in name[len(inside) + 1 :])
    )


def _line(m: Member) -> str:
    mode = stat.filemode(m.mode | _LETTERS[m.type])
    when = datetime.fromtimestamp(m.mtime_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M")
    arrow = {MemberType.SYMLINK: " -> ", MemberType.HARDLINK: " = "}.get(m.type, "")
    return f"{mode} {m.uid:>5}:{m.gid:<5} {size(m.size):>8} {when} {m.name or '.'}{arrow}{m.link}"


@command("cat", short_help="One file of a recovery point, to standard output.")
@click.argument("point")
@click.argument("path")
def cat_command(session: Session, point: str, path: str) -> int:
    """One file of a recovery point to standard output, byte for byte."""
    out = _binary_stdout("a file's bytes")
    _write(session.agent.open(point).read(path.strip("/")), out)
    return 0


@command("export", short_help="A recovery point as a plain .tar.zst.")
@click.argument("point")
@click.argument("file", required=False, default="", metavar="[FILE|-]")
def export_command(session: Session, point: str, file: str) -> int:
    """A recovery point as a plain .tar.zst, readable by tar and zstd alone.

    FILE appears when it is whole, and is never overwritten; it is SOURCE-POINT.tar.zst where none is named.
    `-` is standard output.
    """
    from backupd.restore import export, export_to_file

    archive = session.agent.open(point)
    with watching(session) as watch:
        progress = watch(archive.point.source, archive.point.size)
        if file == "-":
            _write(export(archive, progress), _binary_stdout("an archive"))
            return 0
        target = Path(file or f"{archive.point.source}-{archive.point.id}.tar.zst")
        export_to_file(archive, target, progress)
    if session.json:
        print_json({"file": target, "point": archive.point.id, "size": target.stat().st_size})
    else:
        note(session, f"{target}: {size(target.stat().st_size)}")
    return 0


def _write(chunks: Iterator[bytes], out: BinaryIO) -> None:
    for chunk in chunks:
        out.write(chunk)
    out.flush()


def _binary_stdout(what: str) -> BinaryIO:
    if sys.stdout.isatty():
        raise UsageError(
            f"{what} would spoil the terminal", hint="send it to a file or a program: ... > file"
        )
    return sys.stdout.buffer
