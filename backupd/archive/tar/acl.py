"""POSIX ACLs: the text that archives carry, and the extended attribute that Linux keeps.

An archive needs both. Docker and `tar --xattrs` restore the attribute; `tar --acls` knows only the text, and
where there is none it takes the ACL away that the attribute just brought (GNU tar 1.34).
"""

from __future__ import annotations

from struct import Struct

TEXT_KEYS = {
    b"SCHILY.acl.access": b"system.posix_acl_access",
    b"SCHILY.acl.default": b"system.posix_acl_default",
}
"""The pax records that carry an ACL as text, and the attribute each stands for."""

_ACL_TAGS = {(b"user", False): 1, (b"user", True): 2, (b"group", False): 4, (b"group", True): 8}
_ACL_NAMES = {1: b"user", 2: b"user", 4: b"group", 8: b"group", 16: b"mask", 32: b"other"}
_NO_ID = 0xFFFFFFFF


def acl_from_text(text: bytes) -> bytes:
    """The xattr of a POSIX ACL from its text (`user::rw-,user:1000:r--,mask::r--,...`, commas or lines).

    A fourth part is the number that belongs to a name. Raises ValueError, also for a name without its number:
    the names of the machine that wrote the archive mean nothing here. Layout (linux/posix_acl_xattr.h):
    version 2, then tag (2 bytes), permissions (2), id (4), little endian, sorted.
    """
    entries: list[tuple[int, int, int]] = []
    for line in text.replace(b"\n", b",").split(b","):
        part = line.split(b"#", 1)[0].strip()
        if not part:
            continue
        tag, _, rest = part.partition(b":")
        who, _, rest = rest.partition(b":")
        letters, _, number = rest.partition(b":")
        permissions = 4 * (b"r" in letters) + 2 * (b"w" in letters) + (b"x" in letters)
        if tag in (b"mask", b"other"):
            entries.append(({b"mask": 0x10, b"other": 0x20}[tag], permissions, _NO_ID))
            continue
        code = _ACL_TAGS.get((tag, bool(who)))
        owner = (number or who).strip()
        if code is None or (who and not owner.isdigit()):
            raise ValueError(f"unknown entry {part.decode(errors='backslashreplace')!r}")
        entries.append((code, permissions, int(owner) if who else _NO_ID))
    pack = Struct("<HHI").pack
    return b"\2\0\0\0" + b"".join(pack(*entry) for entry in sorted(entries))


def acl_to_text(value: bytes) -> bytes:
    """The other way; owners as numbers. Raises ValueError where it is no ACL of version 2."""
    if len(value) < 4 or value[:4] != b"\2\0\0\0" or len(value) % 8 != 4:
        raise ValueError("not a POSIX ACL of version 2")
    parts: list[bytes] = []
    for tag, permissions, owner in Struct("<HHI").iter_unpack(value[4:]):
        if tag not in _ACL_NAMES:
            raise ValueError(f"an ACL with the unknown tag {tag}")
        letters = bytes(letter if permissions & bit else 45 for letter, bit in ((114, 4), (119, 2), (120, 1)))
        who = b"%d" % owner if tag in (2, 8) else b""
        parts.append(b"%s:%s:%s" % (_ACL_NAMES[tag], who, letters))
    return b",".join(parts)
