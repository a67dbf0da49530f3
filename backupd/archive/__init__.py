"""The archive engine: members, blobs, frames, index pages, packs; written and read in parallel.

Start at `write` (what a run does), `writer` and `pipeline` (its parts and threads), `pack` and `page` (what is
stored), `read` and `extract` (the way back), `usage`, `repack` and `compact` (what becomes of packs that few still
need). FORMAT.md has the byte offsets.
"""

from backupd.archive.read import PointArchive, open_archive
from backupd.archive.write import write_archive
from backupd.archive.writer import ArchiveWriter, Written

__all__ = ["ArchiveWriter", "PointArchive", "Written", "open_archive", "write_archive"]
