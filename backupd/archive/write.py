"""Write one archive: the reader that fits what a driver captured feeds the writer."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator

from backupd.archive import tar
from backupd.archive.cut import ContentCutter, Cutter, FixedCutter
from backupd.archive.feed import ChunkFill, feed_stream
from backupd.archive.page import Row
from backupd.archive.scan import sort_key
from backupd.archive.tree import TreeReader
from backupd.archive.writer import ArchiveWriter, Written
from backupd.model import Streams, TarStream, Tree


def write_archive(writer: ArchiveWriter, content: Tree | Streams | TarStream) -> Written:
    """Store everything of `content`. Raises what its source raises, StoreError, Interrupted."""
    try:
        if isinstance(content, Tree):
            return TreeReader(writer, content).read()
        if isinstance(content, Streams):
            return _read_streams(writer, content)
        from backupd.archive.tar_stream import TarStreamReader

        return TarStreamReader(writer, content).read()
    except BaseException:
        writer.abandon()
        raise


def _read_streams(writer: ArchiveWriter, content: Streams) -> Written:
    """Each stream is a file of one flat directory."""
    rows: list[Row] = []
    now = time.time_ns()
    for stream in content.streams:
        cutter: Cutter = FixedCutter() if stream.paged else ContentCutter()
        name = os.fsencode(stream.name)
        if len(name) > 80:  # a part's header is one block
            name = writer.digest(name).hex().encode()

        def part_header(number: int, size: int, name: bytes = name) -> bytes:
            return tar.file_header(b"%s.%06d" % (name, number), 0o600, 0, 0, size, now // 10**9)

        fill = ChunkFill(_counted(stream.chunks, writer))
        pieces, size = feed_stream(writer.pipeline, fill, cutter, part_header if writer.plain else None)
        rows.append([stream.name, stat.S_IFREG | 0o600, size, now, now, 0, 0, 0, 1, pieces])
    rows.sort(key=lambda row: str(row[0]))
    writer.add_page([("", None, rows)], "", sort_key(""))
    return writer.finish(ordered=True)


def _counted(chunks: Iterator[bytes], writer: ArchiveWriter) -> Iterator[bytes]:
    for chunk in chunks:
        writer.check_stop()
        yield chunk
