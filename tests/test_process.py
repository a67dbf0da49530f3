"""Programs of this machine, streamed: whole, or known not to be; and nothing of them left behind."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupd.drivers import _process
from backupd.errors import CommandFailed, Damaged
from backupd.sandbox.said import KEPT, Said, ended_badly


def sh(script: str, *args: str) -> list[str]:
    """argv of a shell script."""
    return ["sh", "-c", script, "sh", *args]


def alive(pid: int) -> bool:
    """Running, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_stdout_comes_whole_and_in_large_pieces() -> None:
    """64 MiB arrive byte for byte, in pieces far larger than a pipe's default 64 KiB."""
    chunks = list(_process.run(["head", "-c", str(64 << 20), "/dev/zero"]))
    assert b"".join(chunks) == bytes(64 << 20)
    assert max(map(len, chunks)) > 256 << 10


def test_what_goes_in_comes_out() -> None:
    """Both ways at once, more than any pipe holds: neither side waits for the other."""
    pieces = [os.urandom(300_000) for _ in range(40)]
    assert b"".join(_process.run(["cat"], stdin=iter(pieces))) == b"".join(pieces)


def test_nothing_is_started_before_it_is_read(tmp_path: Path) -> None:
    """An iterator that nobody reads costs nothing and leaves nothing."""
    output = _process.run(sh('touch "$1"', str(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()
    assert list(output) == []
    assert (tmp_path / "ran").exists()


def test_a_bad_end_is_raised_after_the_last_byte() -> None:
    """All that was written arrives first; then the status, with the last line of stderr."""
    received = b""
    with pytest.raises(CommandFailed, match=r"^sh ended with status 3: disk full$") as failure:
        for chunk in _process.run(sh("echo data; echo warning >&2; echo disk full >&2; exit 3")):
            received += chunk
    assert received == b"data\n"
    assert failure.value.returncode == 3
    assert failure.value.stderr == "warning\ndisk full"


def test_an_end_by_a_signal_is_named() -> None:
    """What an out-of-memory killer leaves is a short stream and a signal."""
    with pytest.raises(CommandFailed, match=r"ended by signal 9 \(SIGKILL\)"):
        list(_process.run(sh("echo half; kill -9 $$")))


def test_much_on_stderr_blocks_nothing_and_both_ends_are_kept() -> None:
    """A program that complains a lot must not stand still because nobody listens."""
    with pytest.raises(CommandFailed) as failure:
        list(_process.run(sh("echo first >&2; yes complaint | head -n 200000 >&2; echo last >&2; exit 1")))
    assert failure.value.stderr.startswith("first\n")
    assert failure.value.stderr.endswith("\nlast")
    assert len(failure.value.stderr) < 3 * KEPT


def test_closing_early_ends_the_whole_group(tmp_path: Path) -> None:
    """The program and what it started, even what ignores the first request."""
    script = 'trap "" TERM; sleep 1000 & echo $! > "$1"; echo $$ >> "$1"; yes'
    output = _process.run(sh(script, str(tmp_path / "pids")))
    next(output)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    output.close()  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert not any(map(alive, pids))


def test_a_source_that_breaks_ends_the_program_before_it_sees_an_end(tmp_path: Path) -> None:
    """Half of a dump must not be restored as if it were the whole."""

    def broken() -> Iterator[bytes]:
        yield b"first half"
        time.sleep(0.2)
        raise Damaged("a pack is not what it was")

    script = 'cat > "$1" && touch "$1.complete"'
    with pytest.raises(Damaged, match="a pack"):
        list(_process.run(sh(script, str(tmp_path / "out")), stdin=broken()))
    assert not (tmp_path / "out.complete").exists()


def test_a_program_that_stops_reading_is_judged_by_its_status() -> None:
    """`head` has what it wants; one that fails says so."""
    endless = (bytes(1 << 20) for _ in range(1000))
    assert b"".join(_process.run(["head", "-c", "3"], stdin=endless)) == bytes(3)
    with pytest.raises(CommandFailed, match="status 4"):
        list(_process.run(sh("exit 4"), stdin=(bytes(1 << 20) for _ in range(1000))))


def test_an_iterable_that_is_closed_knows_that_it_is(tmp_path: Path) -> None:
    """What feeds a program is closed with it: it may hold a connection."""
    closed: list[bool] = []

    def source() -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            stack.callback(closed.append, True)
            while True:
                yield bytes(1 << 20)

    list(_process.run(["head", "-c", "1"], stdin=source()))
    assert closed == [True]


def test_a_missing_program_is_one_line_and_a_hint() -> None:
    """Not a traceback."""
    with pytest.raises(CommandFailed, match=r"^there is no program nosuch-pg_dump$") as failure:
        list(_process.run(["nosuch-pg_dump"], hint="install postgresql-client"))
    assert failure.value.hint == "install postgresql-client"
    with pytest.raises(CommandFailed, match="cannot be started"):
        list(_process.run(["/etc/passwd"]))


def test_secrets_travel_in_the_environment_only() -> None:
    """The program has it; the message of its failure does not."""
    assert list(_process.run(sh("printenv SECRET"), env={"SECRET": "hush"})) == [b"hush\n"]
    with pytest.raises(CommandFailed) as failure:
        list(_process.run(sh("exit 1", "argument"), env={"SECRET": "hush"}))
    assert not re.search("hush|argument", failure.value.message + failure.value.hint)


@given(st.lists(st.binary(max_size=3 * KEPT), max_size=6))
def test_what_was_said_keeps_its_beginning_and_its_end(pieces: list[bytes]) -> None:
    """However it arrives; and whole where it is short."""
    said, whole = Said(), b"".join(pieces)
    for piece in pieces:
        said.add(memoryview(piece))
    if len(whole) <= 2 * KEPT:
        assert said.text == whole.decode(errors="replace").strip()
    else:
        joined = whole[:KEPT] + b"\n[...]\n" + whole[-KEPT:]
        assert said.text == joined.decode(errors="replace").strip()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (1, "ended with status 1"),
        (-15, "signal 15 (SIGTERM)"),
        (137, "signal 9 (SIGKILL)"),
        (255, "status 255"),
        (128, "status 128"),
    ],
)
def test_a_status_is_told_in_words(status: int, words: str) -> None:
    """Negative as Python says it, above 128 as a shell or an engine does."""
    assert words in ended_badly("x", status, "").message
