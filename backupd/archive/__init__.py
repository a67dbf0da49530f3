"""The archive engine: members, blobs, frames, index pages, packs; written and read in parallel.

Start at `write` (what a run does), `pipeline` (its threads), `pack` and `page` (what is stored), `read` and
`extract` (the way back). FORMAT.md has the byte offsets.
"""

from backupd.archive.read import PointArchive, open_archive
from backupd.archive.write import ArchiveWriter, Written, write_archive

__all__ = ["ArchiveWriter", "PointArchive", "Written", "open_archive", "write_archive"]
