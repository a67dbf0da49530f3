"""Bytes as given <-> bytes as stored.

Every stored unit (a frame of content, an index page, a pack's directory, a manifest) passes through a codec, and
the manifest names it. `zstd` stores one independent Zstandard frame (RFC 8878) with its content size and its
32-bit checksum, so that `zstd -d` reads it. Encryption will be a second codec here; nothing else need know.
"""

from __future__ import annotations

import threading
from typing import Protocol, TypeAlias

import zstandard
from blake3 import blake3

from backupd.errors import Damaged, UsageError

Buffer: TypeAlias = "bytes | bytearray | memoryview"

DIGEST_SIZE = 16
"""Bytes of BLAKE3 kept of each digest: 128 bits make an accidental collision impossible in practice."""

DEFAULT_LEVEL = 2
"""Compression is nearly all that a full run computes. Measured on 2 MiB frames of mixed files: level 1 0.55 s at 49.7 %
of the size, level 2 0.8 s at 45.3 %, level 3 1.25 s at 42.7 %; restic stores 49.8 %."""


class Codec(Protocol):
    """One way of storing; safe to use from several threads."""

    @property
    def name(self) -> str: ...

    def encode(self, data: Buffer) -> bytes:
        """As stored."""

    def decode(self, stored: Buffer, size: int) -> bytes:
        """As given; `size` is the length it must have. Raises Damaged."""

    def decode_unsized(self, stored: Buffer, *, limit: int) -> bytes:
        """As given, where no index names the length: at most `limit` bytes. Raises Damaged."""

    def digest(self, data: Buffer) -> bytes:
        """DIGEST_SIZE bytes that name this content."""


class ZstdCodec:
    """Zstandard frames, BLAKE3 names, no encryption."""

    name = "zstd"

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        self._level = level
        self._local = threading.local()  # contexts are not safe to share between threads

    def encode(self, data: Buffer) -> bytes:
        try:
            compressor = self._local.compressor
        except AttributeError:
            compressor = self._local.compressor = zstandard.ZstdCompressor(
                level=self._level, write_checksum=True, write_content_size=True
            )
        return bytes(compressor.compress(data))

    def decode(self, stored: Buffer, size: int) -> bytes:
        try:
            decompressor = self._local.decompressor
        except AttributeError:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        # The size written in the frame is the damage's to choose: never allocate by it alone.
        try:
            if zstandard.frame_content_size(stored) != size:
                raise Damaged("a compressed frame does not have the length that its index names")
            data = decompressor.decompress(stored)
        except zstandard.ZstdError as error:
            raise Damaged(f"a compressed frame cannot be read: {error}") from None
        if len(data) != size:
            raise Damaged("a compressed frame does not have the length that its index names")
        return bytes(data)

    def decode_unsized(self, stored: Buffer, *, limit: int) -> bytes:
        try:
            size = zstandard.frame_content_size(stored)
        except zstandard.ZstdError as error:
            raise Damaged(f"it is not a compressed frame: {error}") from None
        if not 0 <= size <= limit:
            raise Damaged("the compressed frame does not say its length, or lies about it")
        return self.decode(stored, size)

    def digest(self, data: Buffer) -> bytes:
        return blake3(data).digest(length=DIGEST_SIZE)


def codec_named(name: str, *, level: int = DEFAULT_LEVEL) -> Codec:
    """The codec a manifest names. Raises UsageError for one this version does not know."""
    if name == ZstdCodec.name:
        return ZstdCodec(level)
    raise UsageError(
        f"this repository was written with the codec '{name}', which this version does not know",
        hint="use a newer backupd, or the recover.py that lies in the repository",
    )
