"""Trees with every kind of entry that Linux has, and a way to tell whether two trees are the same."""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
from hashlib import sha256
from pathlib import Path

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service+ep
_UNDEFINED = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The xattr of a POSIX ACL from (tag, permissions, id); tags 1, 2 user, 4, 8 group, 16 mask, 32 other."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACCESS_ACL = acl(
    (1, 6, _UNDEFINED), (2, 4, 1234), (4, 4, _UNDEFINED), (16, 4, _UNDEFINED), (32, 0, _UNDEFINED)
)
DEFAULT_ACL = acl(
    (1, 7, _UNDEFINED), (4, 5, _UNDEFINED), (8, 7, 4321), (16, 7, _UNDEFINED), (32, 0, _UNDEFINED)
)


def make_every_kind(root: Path) -> None:
    """Fill `root` (made if absent). Needs root's rights and a file system with xattrs (ext4, xfs, btrfs)."""
    root.mkdir(parents=True, exist_ok=True)
    _files(root)
    _names(root / "names")
    _links(root)
    _attributes(root / "attributes")
    _sparse(root / "sparse")
    _special(root / "special")
    _times(root)


def _write(path: Path, data: bytes = b"", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def _files(root: Path) -> None:
    noise = random.Random(7)  # the same bytes every time
    for size in (0, 1, 511, 512, 513, 4096, 100_000, 1 << 20, (1 << 20) + 1, 3_333_333):
        _write(root / "sizes" / f"{size}.bin", noise.randbytes(size))
    for mode in (0o000, 0o400, 0o600, 0o755, 0o4755, 0o2755, 0o1644, 0o7777):
        _write(root / "modes" / f"{mode:04o}", b"mode", mode)
    for uid, gid in ((12345, 54321), (65534, 65534), (3_000_000_000, 4_000_000_000)):
        path = _write(root / "owners" / f"{uid}-{gid}", b"owned")
        os.chown(path, uid, gid)
        path.chmod(0o6755)  # behind chown, which takes these bits away
    (root / "empty").mkdir()
    (root / "closed").mkdir(mode=0o700)
    (root / "shared").mkdir()
    (root / "shared").chmod(0o3777)
    os.chown(root / "shared", 12345, 54321)
    for number in range(30):
        _write(root / "many" / f"{number % 5}" / f"file-{number:03d}.txt", b"line\n" * number)


def _names(base: Path) -> None:
    odd = [
        b"caf\xe9",
        b"\xff\xfe\xfd",
        "naïve-文件-🗂".encode(),
        b"new\nline",
        b"tab\tand space ",
        b" leading",
        b"-dash",
        b"star*?[a]",
        b"quote'\"\\n\\",
        b"\x01\x02\x7f",
        b"...",
        b"name=value%3D%25",
        b"." + b"h" * 99,
        b"n" * 100,
        b"n" * 101,
        b"x" * 255,
    ]
    for name in odd:
        _write(base / os.fsdecode(name), name)
    _write(base / ("d" * 255) / ("e" * 255) / ("f" * 255) / "deep", b"deep")
    _write(base / ("p" * 60) / ("q" * 60) / ("r" * 60) / "prefix", b"needs ustar's prefix")
    _write(base / os.fsdecode(b"d\xe9" * 60) / os.fsdecode(b"\xe9" * 200), b"long and no UTF-8")


def _links(root: Path) -> None:
    base = root / "links"
    _write(base / "a" / "one", b"one file, three names" * 1000)
    (base / "b").mkdir()
    os.link(base / "a" / "one", base / "b" / "two")
    os.link(base / "a" / "one", root / "three")
    os.link(_write(base / "empty-one"), base / "empty-two")
    os.link(root / "sizes" / "3333333.bin", base / "big")
    os.link(root / "names" / os.fsdecode(b"caf\xe9"), base / ("l" * 200))
    soft = {
        "relative": "a/one",
        "directory": "a",
        "absolute": "/etc/hostname",
        "dangling": "nowhere/at/all",
        "long": "t/" * 200 + "end",
        "bytes": os.fsdecode(b"\xe9" * 120),
        "slash": "a/",
        "l" * 255: "a/one",
    }
    for name, target in soft.items():
        (base / name).symlink_to(target)
    os.chown(base / "relative", 12345, 54321, follow_symlinks=False)


def _attributes(base: Path) -> None:
    plain = _write(base / "plain", b"has attributes")
    os.setxattr(plain, "user.note", "für später".encode())
    os.setxattr(plain, "user.binary", bytes(range(256)) + b"\n\0=\n")
    os.setxattr(plain, "user.empty", b"")
    os.setxattr(plain, "user.odd=name%3D", b"odd")
    os.setxattr(plain, "trusted.overlay", b"y")
    os.setxattr(_write(base / "large", b"x" * 1000), "user.large", b"v" * 2000)
    capable = _write(base / "capable", b"binary", 0o755)
    os.chown(capable, 12345, 54321)
    os.setxattr(capable, "security.capability", CAPABILITY)
    os.setxattr(_write(base / "acl", b"acl", 0o640), "system.posix_acl_access", ACCESS_ACL)
    directory = base / "directory"
    directory.mkdir()
    os.setxattr(directory, "user.note", b"on a directory")
    os.setxattr(directory, "system.posix_acl_access", ACCESS_ACL)
    os.setxattr(directory, "system.posix_acl_default", DEFAULT_ACL)
    _write(directory / "heir", b"inherits")
    os.link(plain, base / "linked")
    (base / "link").symlink_to("plain")
    os.setxattr(base / "link", "trusted.link", b"on a link", follow_symlinks=False)


def _sparse(base: Path) -> None:
    base.mkdir()
    with open(base / "pieces", "wb") as file:
        for offset in (1 << 20, 5 << 20, (9 << 20) + 4096):
            file.seek(offset)
            file.write(b"data" * 2048)
        file.truncate(16 << 20)
    with open(base / "hole", "wb") as file:
        file.truncate(8 << 20)
    with open(base / "ends-in-data", "wb") as file:
        file.seek((4 << 20) + 1)
        file.write(b"end")
    with open(base / "many-pieces", "wb") as file:
        for number in range(200):
            file.seek(number * 32768)
            file.write(b"%04d" % number * 1024)


def _special(base: Path) -> None:
    base.mkdir()
    os.mkfifo(base / "fifo", 0o640)
    os.mknod(base / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(base / "loop", 0o660 | stat.S_IFBLK, os.makedev(7, 200))
    os.mknod(base / "wide", 0o600 | stat.S_IFCHR, os.makedev(4095, 1_048_575))
    server = socket.socket(socket.AF_UNIX)
    try:
        here = os.open(base, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket")  # a socket's path may have 108 bytes only
        os.close(here)
    finally:
        server.close()


def _times(root: Path) -> None:
    """A time of its own with odd nanoseconds on everything, directories last."""
    for number, (at, directories, files) in enumerate(os.walk(os.fsencode(root), topdown=False)):
        for index, name in enumerate(sorted(files) + sorted(directories)):
            when = 1_500_000_000_123_456_789 + number * 1_000_000_007_001 + index * 1_000_003
            os.utime(os.path.join(at, name), ns=(when, when), follow_symlinks=False)
    for year, when in (
        ("1969", -1_500_000_001),
        ("1901", -2_100_000_000 * 10**9),
        ("2300", 10_413_792_000 * 10**9 + 5),
    ):
        os.utime(_write(root / "times" / year, b"when"), ns=(when, when))
    os.utime(root / "times", ns=(1, 1))
    os.utime(root, ns=(1_400_000_000_000_000_001, 1_400_000_000_000_000_001))


def make_beyond_path_max(root: Path) -> int:
    """A file under more than 4,096 bytes of path, reachable by directory handles only; returns its length."""
    root.mkdir(parents=True, exist_ok=True)
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    length = 0
    for number in range(20):
        name = f"{number:02d}" + "w" * 250
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
        length += len(name) + 1
    file = os.open("bottom", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=at)
    os.write(file, b"at the bottom")
    os.close(file)
    os.close(at)
    return length + len("bottom")


Entry = dict[str, object]


def describe(root: Path | str, *, sockets: bool = False) -> dict[str, Entry]:
    """Everything a restore must bring back, by path (`.` is the root itself); odd bytes as surrogate escapes.

    Type, mode, owner, size, digest of the content, time in ns, link, device, xattrs (ACLs among them), the
    first name of a group of hard links, and whether a file has holes. Sockets are left out: none is kept.
    """
    found: dict[str, Entry] = {}
    groups: dict[tuple[int, int], str] = {}
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found["."] = _entry(handle, ".", os.fstat(handle))
        _describe(handle, "", found, groups, sockets)
    finally:
        os.close(handle)
    return found


def _describe(
    handle: int, prefix: str, found: dict[str, Entry], groups: dict[tuple[int, int], str], sockets: bool
) -> None:
    for name in sorted(os.listdir(handle), key=os.fsencode):
        path = prefix + name
        status = os.stat(name, dir_fd=handle, follow_symlinks=False)
        if stat.S_ISSOCK(status.st_mode) and not sockets:
            continue
        found[path] = _entry(handle, name, status)
        if stat.S_ISDIR(status.st_mode):
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            try:
                _describe(below, path + "/", found, groups, sockets)
            finally:
                os.close(below)
        elif status.st_nlink > 1:
            found[path]["same as"] = groups.setdefault((status.st_dev, status.st_ino), path)


def _entry(handle: int, name: str, status: os.stat_result) -> Entry:
    at = f"/proc/self/fd/{handle}/{name}"
    entry: Entry = {
        "type": stat.filemode(status.st_mode)[0],
        "mode": oct(stat.S_IMODE(status.st_mode)),
        "owner": (status.st_uid, status.st_gid),
        "mtime": status.st_mtime_ns,
        "xattrs": {
            key: os.getxattr(at, key, follow_symlinks=False)
            for key in sorted(os.listxattr(at, follow_symlinks=False))
        },
    }
    if stat.S_ISREG(status.st_mode):
        digest = sha256()
        with open(at, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        entry["size"] = status.st_size
        entry["digest"] = digest.hexdigest()
        entry["sparse"] = status.st_size >= 65536 and status.st_blocks * 512 < status.st_size * 0.9
    elif stat.S_ISLNK(status.st_mode):
        entry["link"] = os.readlink(name, dir_fd=handle)
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        entry["device"] = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return entry


def differences(
    before: dict[str, Entry], after: dict[str, Entry], *, ignore: tuple[str, ...] = ()
) -> list[str]:
    """One line for each thing that is not the same; empty when the trees are."""
    lines = [f"missing: {path!r}" for path in before.keys() - after.keys()]
    lines += [f"extra: {path!r}" for path in after.keys() - before.keys()]
    for path in before.keys() & after.keys():
        for key in before[path].keys() | after[path].keys():
            was, now = before[path].get(key), after[path].get(key)
            if was != now and key not in ignore:
                lines.append(f"{path!r}: {key} was {was!r}, is {now!r}")
    return sorted(lines)
