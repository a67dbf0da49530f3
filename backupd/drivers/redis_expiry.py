"""Keys whose time to live has passed between the instant of a restore and now.

They are part of the restored state, and a server drops them as soon as it may: that is what happened at the source too.
Who wants them kept has every time to live run on from where it stood: all expiry times are moved by what has passed
since. That is one script, executed as the last command of the stream or of an append-only file: there, and nowhere
else, a server sees keys whose time has passed (Redis 7 and newer, Valkey). It is given the distance, not the time, so
that it does the same on a replica, or when the file is loaded again.

The distance is from the restored instant, by the source's clock, as it wrote the expiry times, to the moment at which
the script is written, by the restored server's clock, as that is the one they are compared with. From that moment on
time passes: also while the server loads what stands before the script.

Fields of hashes with a time of their own: Valkey keeps them too; Redis shows those that have passed to nobody, and only
moves the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from backupd.drivers.redis_wire import Connection
from backupd.errors import RestoreFailed

OLDEST = 7
"""Before, SCAN hides a key whose time has passed also from the stream, and nothing tells when that was."""

SCRIPT = """\
local shift = tonumber(ARGV[1])
local function moved(at) return string.format('%.0f', at + shift) end
local function fields_of(key)
  local fields = redis.call('HKEYS', key)
  for first = 1, #fields, 1000 do
    local some = {unpack(fields, first, math.min(first + 999, #fields))}
    local times = redis.pcall('HPEXPIRETIME', key, 'FIELDS', #some, unpack(some))
    if times.err then return end
    for n, at in ipairs(times) do
      if type(at) == 'number' and at > 0 then
        redis.call('HPEXPIREAT', key, moved(at), 'FIELDS', 1, some[n])
      end
    end
  end
end
local function each(todo, ...)
  local cursor = '0'
  repeat
    local found = redis.call('SCAN', cursor, 'COUNT', 1000, ...)
    cursor = found[1]
    for _, key in ipairs(found[2]) do todo(key) end
  until cursor == '0'
end
for database = 0, tonumber(ARGV[2]) - 1 do
  redis.call('SELECT', database)
  each(function(key)
    local at = redis.call('PEXPIRETIME', key)
    if at > 0 then redis.call('PEXPIREAT', key, moved(at)) end
  end)
  if ARGV[3] == '1' then each(fields_of, 'TYPE', 'hash') end
end
"""


def command(*words: str) -> bytes:
    """A command as a stream or an append-only file holds it."""
    coded = [word.encode() for word in words]
    return b"*%d\r\n" % len(coded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in coded)


def kept(passed: timedelta, databases: int, *, fields: bool = False) -> bytes:
    """The command that moves every expiry time of databases 0 to `databases` - 1 by `passed`; also those of the fields
    of hashes, where the server knows such."""
    shift = passed // timedelta(milliseconds=1)
    return command("EVAL", SCRIPT, "0", str(shift), str(databases), "1" if fields else "0")


def keeping(server: Connection, since: datetime) -> bytes:
    """The command by which this server keeps what has expired since then. Raises RestoreFailed."""
    about = server.info("server")
    refuse_old(about)
    passed = max(server.time() - since, timedelta(0))
    databases = server.config("databases").get("databases", "16")
    return kept(passed, int(databases), fields=has_fields(about))


def has_fields(about: Mapping[str, str]) -> bool:
    """Whether fields of hashes can expire on a server, by its INFO: Redis 7.4, Valkey 9."""
    if "valkey_version" in about:
        return version(about["valkey_version"]) >= (9, 0)
    return version(about.get("redis_version", "")) >= (7, 4)


def refuse_old(about: Mapping[str, str]) -> None:
    """Raises RestoreFailed for a server on which the script would see nothing."""
    told = about.get("redis_version", "")
    if version(told) < (OLDEST, 0):
        raise RestoreFailed(
            f"keys whose time to live has passed cannot be kept on Redis {told}",
            hint=f"Redis {OLDEST}.0 or newer can; or leave --expired out",
        )


def version(text: str) -> tuple[int, int]:
    """Major and minor; zeros for what is no version."""
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
