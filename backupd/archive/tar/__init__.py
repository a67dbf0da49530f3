"""The tar format: what the archive is written in, and what helpers hand over (`read`).

Written here, it is read back byte for byte by GNU tar, bsdtar, Docker and Python. Names and links are bytes
throughout: a file's name in Linux is bytes, and so is tar's.
"""

from backupd.archive.tar.acl import acl_from_text, acl_to_text
from backupd.archive.tar.write import (
    BLOCK,
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    END,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    file_header,
    header,
    padding,
    sparse_size,
)

__all__ = [
    "BLOCK",
    "BLOCK_DEVICE",
    "CHARACTER_DEVICE",
    "DIRECTORY",
    "END",
    "FIFO",
    "FILE",
    "HARDLINK",
    "SYMLINK",
    "acl_from_text",
    "acl_to_text",
    "file_header",
    "header",
    "padding",
    "sparse_size",
]
