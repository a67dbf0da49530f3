"""The story of `mode = "pitr"` on Redis as a user lives it: the agent records, is killed, goes on; any instant comes
back exactly as it was."""

from __future__ import annotations

import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import redis as redis_py
import services as bed
from commands import Home, recording_config
from test_postgres_to_the_second import bars, serving, window_end

from backupd.sandbox.docker import Engine

CONFIG = recording_config("cart", "redis", "redis://backupd:secret@{host}:{port}")
RIGHTS = ["-@all", "+ping", "+time", "+info", "+config|get", "+psync", "+replconf", "+multi", "+exec"]
STAMP = """
local now = redis.call('TIME')
redis.call('RPUSH', 'stamps', now[1] .. string.format('%06d', now[2]))
redis.call('SET', 'fleeting:' .. now[2], 'v', 'PX', 400)
"""
"""Every write carries the instant at which the server executed it."""


def client(host: str, port: int) -> Any:
    return redis_py.Redis(host, port, decode_responses=True, socket_timeout=20)


def stamps_of(host: str, port: int) -> list[datetime]:
    """When each write that is there was executed."""
    start = datetime(1970, 1, 1, tzinfo=UTC)
    return [
        start + timedelta(microseconds=int(stamp)) for stamp in client(host, port).lrange("stamps", 0, -1)
    ]


def restored_to(home: Home, at: str) -> tuple[list[datetime], dict[str, Any]]:
    """The writes that came back, and where the restore says it landed."""
    name = f"e2e-{time.time_ns()}"
    try:
        done = home.run("restore", "--at", at, "cart", "--name", name, "--json")
        host, port = Engine().container(f"backupd-{name}-cart").address(6379)
        (restored,) = done.json["restored"]
        planned = done.json["plan"]["steps"][0]["lands_at"].replace("Z", "+00:00")
        assert at == "latest" or restored["recovered"]["as_of"] == planned
        assert done.code == (3 if restored["warnings"] else 0), done.err
        return stamps_of(host, port), {"warnings": restored["warnings"], **restored["recovered"]}
    finally:
        home.run("sandbox", "remove", name)


def by_hand(services: bed.Services, home: Home, at: datetime, written: list[datetime]) -> None:
    """The same without backupd, as RECOVER.md says: files that the server executes when it starts."""
    point = home.ok("list", "cart", "--json").json[0]["id"]
    out = home.path / "by-hand"
    argv = ["python3", "-I", home.path / "repo" / "recover.py", "redis", point, out, "--at", at.isoformat()]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    landed = datetime.fromisoformat(done.stdout.split(" at ")[1].split(",")[0])
    assert landed <= at
    subprocess.run(["chmod", "-R", "a+rwX", out], check=True)
    server = services.redis("--appendonly", "yes", volume=str(out))
    assert stamps_of(server.host, server.port) == [stamp for stamp in written if stamp < landed] != []


def test_any_instant_comes_back_exactly_also_where_the_agent_was_killed_meanwhile(
    services: bed.Services, tmp_path: Path
) -> None:
    """What is restored are the writes up to an instant just before T, all of them and nothing later; where T is an
    instant at which nobody recorded, it is told how much earlier."""
    server = services.redis("--repl-diskless-sync-delay", "0", "--repl-backlog-size", "64mb")
    source = client(server.host, server.port)
    source.execute_command("ACL", "SETUSER", "backupd", "on", ">secret", *RIGHTS)
    home = Home(tmp_path)
    home.configure(CONFIG.format(host=server.host, port=server.port, free=bed.free_ports(1)[0]))
    home.ok("init")
    home.ok("check")
    stop = threading.Event()

    def write() -> None:
        mine = client(server.host, server.port)
        while not stop.wait(0.01):
            mine.eval(STAMP, 0)

    writer = threading.Thread(target=write)
    with serving(home):
        bed.wait_until(lambda: bool(bars(home, "cart")), timeout=60, what="a window")
        writer.start()
        time.sleep(1.5)
        first = datetime.now(UTC)
        time.sleep(1)
        (told,) = home.ok("status", "--json").json
        assert told["retained"]["size"] < 1 << 20 < told["retained"]["room"]
    time.sleep(2)
    second = datetime.now(UTC)  # nobody records now: the server's backlog keeps it
    time.sleep(1)
    with serving(home) as agent:
        again = second + timedelta(seconds=1)
        bed.wait_until(lambda: window_end(home, "cart") > again, timeout=60, what=f"the log from {again} on")
        time.sleep(0.5)
        third = datetime.now(UTC)
        time.sleep(1)
        stop.set()
        writer.join()
        wanted = datetime.now(UTC)  # keys that expire are written about for a moment more
        bed.wait_until(lambda: window_end(home, "cart") >= wanted, timeout=60, what=f"the log up to {wanted}")
        agent.terminate()
        assert agent.wait(timeout=60) == 0
    assert len(bars(home, "cart")) == 1, "the kill tore the window"
    written = stamps_of(server.host, server.port)
    for at in (first, second, third):
        back, said = restored_to(home, at.isoformat())
        landed = datetime.fromisoformat(said["as_of"])
        assert landed <= at
        assert back == [stamp for stamp in written if stamp < landed]
        assert back
        if at is second:  # what was done until then is there, but not when
            assert "nobody recorded it then" in said["warnings"][0]
        else:
            assert at - landed < timedelta(seconds=1) and not said["warnings"]
        assert datetime.fromisoformat(said["more_by"]) > at
    back, _ = restored_to(home, "latest")
    assert back == written
    by_hand(services, home, first, written)
    assert "in the future" in home.refused("restore", "--at", "2099-01-01T00:00:00Z", "cart", code=2).message
    assert home.refused("plan", "--at", "2001-01-01T00:00:00Z", "cart", code=21).hint
    home.ok("verify", "--data", "100%")
    assert "cart" in home.ok("status").out
