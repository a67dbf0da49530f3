#!/usr/bin/env python3
"""Get everything back from this repository without backupd. Needs Python 3.8 or later and one of: Python 3.14's
own zstd, the Python module `zstandard`, or the program `zstd`. Nothing else.

    python3 recover.py list                       what can be restored
    python3 recover.py ls POINT                   the files of one recovery point
    python3 recover.py extract POINT DIRECTORY    write them into a new or empty directory
    python3 recover.py redis POINT DIRECTORY      a Redis that was recorded: point and log as appendonlydir, up to
              [--at 2026-03-01T14:30:00Z]         this instant (UTC), or as far as it is known

POINT is an id from `list`, or the first digits of it. Run it where it lies, or give the repository's directory
with --repository. A repository in a bucket is copied down first, with any tool: the keys are the paths.

What a restored database file is for, RECOVER.md tells.
"""

import argparse
import base64
import json
import os
import re
import stat
import struct
import subprocess
import sys
from datetime import datetime, timedelta, timezone


class Broken(Exception):
    """What is stored is not what was written."""


def _zstd_command(data):
    try:
        done = subprocess.run(
            ["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False
        )
    except FileNotFoundError:
        sys.exit("recover.py: no way to read zstd: install the program `zstd`, or `pip install zstandard`")
    if done.returncode:
        raise Broken(done.stderr.decode(errors="replace").strip() or "zstd failed")
    return done.stdout


def _choose_zstd():
    try:
        from compression import zstd  # Python 3.14 and later

        return lambda data: zstd.decompress(data)
    except ImportError:
        pass
    try:
        import zstandard

        return lambda data: zstandard.ZstdDecompressor().decompress(data)
    except ImportError:
        return _zstd_command


decompress = _choose_zstd()

try:
    from blake3 import blake3

    def check(data, digest):
        """Compare content with its digest (only where the module blake3 is there; zstd's checksum counts always)."""
        if blake3(data).digest(length=16) != digest:
            raise Broken("content is not what was written")

except ImportError:

    def check(data, digest):
        """Without the module blake3, the checksum in each zstd frame is what guards the content."""


def unpack(data):
    """Decompress one zstd frame."""
    try:
        return decompress(bytes(data))
    except Exception as error:
        raise Broken("compressed data cannot be read: %s" % error) from None


class Pack:
    """A pack file: its directory, and its frames, decoded one at a time."""

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 16))
            stored, _, mark = struct.unpack("<II8s", file.read(16))
            if mark != b"BKPDDIR1":
                raise Broken("%s has no directory: it is cut short" % path)
            file.seek(size - 16 - stored)
            plain = unpack(file.read(stored))
        head, count = struct.unpack_from("<II", plain)
        self.frames = json.loads(plain[8 : 8 + head].decode())["frames"]
        self.blobs = plain[8 + head :]
        if len(self.blobs) != count * 24:
            raise Broken("%s: its directory is damaged" % path)
        self.starts = [0]
        for frame in self.frames:
            self.starts.append(self.starts[-1] + frame[3])
        self.decoded = (-1, b"")

    def read(self, first, count):
        """The bytes of a run of blobs."""
        frame = 0
        for number in range(first, first + count):
            while number >= self.starts[frame + 1]:
                frame += 1
            if self.decoded[0] != frame:
                offset, length, size, _ = self.frames[frame]
                with open(self.path, "rb") as file:
                    file.seek(offset)
                    data = unpack(file.read(length))
                if len(data) != size:
                    raise Broken("%s: a frame has the wrong length" % self.path)
                self.decoded = (frame, data)
            offset, length, digest = struct.unpack_from("<II16s", self.blobs, number * 24)
            part = self.decoded[1][offset : offset + length]
            if len(part) != length:
                raise Broken("%s: a blob has the wrong length" % self.path)
            check(part, digest)
            yield part


class Repository:
    """A repository in a directory."""

    def __init__(self, root):
        self.root = root
        try:
            with open(os.path.join(root, "backupd-repository.json"), encoding="utf-8") as file:
                head = json.load(file)
        except OSError:
            sys.exit("recover.py: %s is not a repository (give its directory with --repository)" % root)
        if head.get("format") != 1 or head.get("codec") != "zstd":
            sys.exit("recover.py: this program reads format 1, codec zstd; this is %r" % head)
        self.packs = {}

    def manifests(self):
        """(source, id, path) of every recovery point, oldest first."""
        found = []
        base = os.path.join(self.root, "points")
        for source in sorted(os.listdir(base)) if os.path.isdir(base) else ():
            for name in sorted(os.listdir(os.path.join(base, source))):
                if name.endswith(".json.zst"):
                    found.append((source, name[:-9].split("-")[1], os.path.join(base, source, name)))
        return found

    def manifest(self, prefix):
        matches = [item for item in self.manifests() if item[1].startswith(prefix)]
        if len(matches) != 1:
            sys.exit("recover.py: '%s' names %d recovery points; see `list`" % (prefix, len(matches)))
        source, _, path = matches[0]
        with open(path, "rb") as file:
            return source, json.loads(unpack(file.read()).decode())

    def pack(self, source, name):
        if (source, name) not in self.packs:
            if len(self.packs) > 30:
                self.packs.clear()
            self.packs[source, name] = Pack(
                os.path.join(self.root, "packs", source, *name.split("/")) + ".zst"
            )
        return self.packs[source, name]

    def rows(self, source, manifest):
        """(path, row, pack names) of every member, directories before what is in them; see FORMAT.md for the row."""
        names = [pack[0] for pack in manifest["packs"]]
        for page in manifest["pages"]:
            _, pack, offset, length = page[:4]
            with open(
                os.path.join(self.root, "packs", source, *names[pack].split("/")) + ".zst", "rb"
            ) as file:
                file.seek(offset)
                data = json.loads(unpack(file.read(length)).decode())
            for path, own, rows in data["dirs"]:
                if own is not None:
                    yield path, own, data["packs"]
                for row in rows:
                    yield (path + "/" + row[0] if path else row[0]), row, data["packs"]

    def content(self, source, row, packs):
        flat = row[9] or []
        for i in range(0, len(flat), 3):
            yield from self.pack(source, packs[flat[i]]).read(flat[i + 1], flat[i + 2])


def extra(row):
    return row[10] if len(row) > 10 else {}


def safe(name):
    if name and any(part in ("", ".", "..") for part in name.split("/")):
        raise Broken("the index has a path that leads outside: %r" % name)
    return name


def set_attributes(path, row, warn):
    """Owner, mode, xattrs, times: in this order, since each of them undoes some of the later ones."""
    link = stat.S_ISLNK(row[1])
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        os.chown(path, row[6], row[7], follow_symlinks=False)
    if not link:
        os.chmod(path, stat.S_IMODE(row[1]))
    for name, value in extra(row).get("xattrs", {}).items():
        try:
            os.setxattr(path, name, base64.b64decode(value), follow_symlinks=False)
        except (OSError, AttributeError) as error:
            warn("%r: the attribute %s could not be set: %s" % (path, name, error))
    os.utime(path, ns=(row[3], row[3]), follow_symlinks=False)


def write_file(repository, source, target, row, packs):
    extents = extra(row).get("sparse")
    with open(target, "xb") as file:
        parts = repository.content(source, row, packs)
        if extents is None:
            for part in parts:
                file.write(part)
            if file.tell() != row[2]:
                raise Broken("%r: %d bytes instead of %d" % (target, file.tell(), row[2]))
            return
        file.truncate(row[2])
        rest = b""
        for offset, length in extents:
            file.seek(offset)
            while length:
                rest = rest or next(parts)
                part, rest = rest[:length], rest[length:]
                file.write(part)
                length -= len(part)


def extract(repository, prefix, into, warn):
    source, manifest = repository.manifest(prefix)
    os.makedirs(into, exist_ok=True)
    if os.listdir(into):
        sys.exit("recover.py: %s is not empty" % into)
    directories, later, count = [], [], 0
    for name, row, packs in repository.rows(source, manifest):
        target = os.path.join(into, safe(name)) if name else into
        kind = stat.S_IFMT(row[1])
        if kind == stat.S_IFDIR:
            os.makedirs(target, mode=0o700, exist_ok=True)
            directories.append((target, row))
        elif "hardlink" in extra(row) or kind == stat.S_IFLNK:
            later.append((target, row))
        elif kind == stat.S_IFREG:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            write_file(repository, source, target, row, packs)
            set_attributes(target, row, warn)
        else:
            try:
                os.mknod(target, row[1], os.makedev(*extra(row).get("device", (0, 0))))
                set_attributes(target, row, warn)
            except PermissionError:
                warn("%r: only root can make a device" % target)
        count += 1
    # Links last, symlinks last of all: nothing is ever written or linked through one of them.
    for target, row in sorted(later, key=lambda item: stat.S_ISLNK(item[1][1])):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if "hardlink" in extra(row):
            os.link(os.path.join(into, safe(extra(row)["hardlink"])), target, follow_symlinks=False)
        else:
            os.symlink(row[9], target)
            set_attributes(target, row, warn)
    for target, row in reversed(directories):
        set_attributes(target, row, warn)
    print("%d entries of %s written to %s" % (count, source, into))


LOG = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-(gap|none|after-[A-Za-z0-9-]+|[0-9]{8}T[0-9.]+Z)\.zst")


class Log:
    """The log of a source, read on from a position, piece by piece."""

    def __init__(self, root, source, epoch, position):
        self.folder, self.epoch, self.position = os.path.join(root, "logs", source), epoch, position
        self.first = position
        self.begins, self.epochs = {}, {}
        for name in sorted(os.listdir(self.folder)) if os.path.isdir(self.folder) else ():
            self.epochs[name] = []
            for match in map(LOG.fullmatch, sorted(os.listdir(os.path.join(self.folder, name)))):
                if match and match.group(3).startswith("after-"):
                    self.begins[match.group(3)[6:], int(match.group(1), 16)] = name
                elif match:
                    self.epochs[name].append((int(match.group(1), 16), int(match.group(2), 16), match))

    def pieces(self):
        """(anchors, bytes), each beginning where the one before ended; anchors are [microseconds, position]."""
        while True:
            spans = self.epochs.get(self.epoch, ())
            here = [span for span in spans if span[0] <= self.position < span[1]]
            gap = [
                span for span in spans if span[2].group(3) == "gap" and self.first < span[0] == self.position
            ]
            alone = [span for span in spans if span[0] == span[1] == self.position and span not in gap]
            for _, _, match in alone:
                yield self.read(match)[0], b""
            if here and not gap:
                start, end, match = max(here, key=lambda span: span[1])
                anchors, data = self.read(match)
                if len(data) != end - start:
                    raise Broken("%s: a piece has the wrong length" % match.group())
                yield anchors, data[self.position - start :]
                self.position = end
            elif (self.epoch, self.position) in self.begins and not gap:
                self.epoch = self.begins[self.epoch, self.position]
            else:
                return

    def read(self, match):
        with open(os.path.join(self.folder, self.epoch, match.group()), "rb") as file:
            stored = file.read()
        at = 8 + struct.unpack_from("<I", stored, 4)[0]
        head, parts = json.loads(unpack(stored[8:at]).decode()), []
        for length, _, digest in head["frames"]:
            parts.append(unpack(stored[at : at + length]))
            check(parts[-1], bytes.fromhex(digest))
            at += length
        return head["anchors"], b"".join(parts)


def redis(repository, prefix, into, until):
    """Point and log as Redis 7 and later lay them down themselves: the server executes the log when it starts."""
    source, manifest = repository.manifest(prefix)
    about = manifest["point"]["attributes"]
    if manifest["point"]["driver"] != "redis" or "epoch" not in about:
        sys.exit("recover.py: that is no point of a Redis that was recorded; use `extract`")
    folder = os.path.join(into, "appendonlydir")
    os.makedirs(folder)
    for name, row, packs in repository.rows(source, manifest):
        if name == "dump.rdb":
            write_file(repository, source, os.path.join(folder, "appendonly.aof.1.base.rdb"), row, packs)
    last, number = None, str(about.get("stream_database", 0)).encode()
    with open(os.path.join(folder, "appendonly.aof.1.incr.aof"), "xb") as file:
        file.write(b"*2\r\n$6\r\nSELECT\r\n$%d\r\n%s\r\n" % (len(number), number))
        begin = file.tell() - about["start"]
        for anchors, data in Log(repository.root, source, about["epoch"], about["start"]).pieces():
            file.write(data)
            last = max([a for a in anchors if a[0] <= until and a[1] >= about["end"]] + ([last] if last else []),
                       default=None)  # fmt: skip
            if any(anchor[0] > until for anchor in anchors):
                break
        if last is None or begin + last[1] > file.tell():
            raise Broken(
                "the log does not reach to the end of the point: take an earlier point, or a later instant"
            )
        file.truncate(begin + last[1])
    with open(os.path.join(folder, "appendonly.aof.manifest"), "x", encoding="ascii") as file:
        file.write(
            "file appendonly.aof.1.base.rdb seq 1 type b\nfile appendonly.aof.1.incr.aof seq 1 type i\n"
        )
    print("%s as it was at %s, in %s" % (source, EPOCH + timedelta(microseconds=last[0]), folder))


EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def micros(text):
    """Microseconds since 1970 of an instant in UTC."""
    at = datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    return (at.replace(tzinfo=at.tzinfo or timezone.utc) - EPOCH) // timedelta(microseconds=1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", default=os.path.dirname(os.path.abspath(__file__)))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("ls").add_argument("point")
    sub = commands.add_parser("extract")
    sub.add_argument("point")
    sub.add_argument("directory")
    sub = commands.add_parser("redis")
    sub.add_argument("point")
    sub.add_argument("directory")
    sub.add_argument("--at", type=micros, default=1 << 62)
    options = parser.parse_args()
    repository = Repository(options.repository)
    warnings = []
    try:
        if options.command == "list":
            for source, point, path in repository.manifests():
                with open(path, "rb") as file:
                    info = json.loads(unpack(file.read()).decode())["point"]
                print(
                    "%s  %-20s %-10s %s  %12d bytes"
                    % (point, source, info["driver"], info["instant"], info["size"])
                )
        elif options.command == "ls":
            source, manifest = repository.manifest(options.point)
            for name, row, _ in repository.rows(source, manifest):
                print("%s %12d %s" % (stat.filemode(row[1]), row[2], ascii(name)[1:-1]))
        elif options.command == "redis":
            redis(repository, options.point, options.directory, options.at)
        else:
            extract(repository, options.point, options.directory, warnings.append)
    except (Broken, OSError) as error:
        sys.exit("recover.py: %s" % error)
    for text in warnings[:50]:
        print("warning: " + text, file=sys.stderr)


if __name__ == "__main__":
    main()
