"""Sixty quiesced instants in the eventful life of a Redis: each brings back exactly what the server held.

The agent is the real one, in a process of its own, and so is its repository. Points, logs and where the replay ends are
what a restore there would take; only the server that is fed is one for all of them, and is looked at while it still is
a replica: a master drops the keys whose time has passed since. The command line itself brings one of them back.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import redis as redis_py
import services as bed
from commands import Home
from redis_exact import (
    Fed,
    Instant,
    Lead,
    held_after_each,
    instant,
    quiesced,
    seen_from,
    work,
)
from test_postgres_to_the_second import bars, serving
from test_redis_to_the_second import CONFIG

from backupd.archive import open_archive
from backupd.chain import Chain, chains
from backupd.drivers.redis_aof import Replay
from backupd.drivers.redis_live import find_landing, up_to
from backupd.errors import NoRecoveryPoint
from backupd.logs import read_logs
from backupd.plan import Step, plan_restore, windows
from backupd.repository import Repository
from backupd.stores import LocalStore

SETTINGS = ("--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0", "--repl-backlog-size", "64mb")
SOURCE = "cart"
EACH = 10
"""Instants between two events."""


def client(service: bed.Service) -> Any:
    """redis-py shares no code with the driver."""
    return redis_py.Redis(service.host, service.port, socket_timeout=20)


@dataclasses.dataclass
class Life:
    """What happened to the servers of one source, and what is in the repository of it."""

    home: Home
    lead: Lead
    server: bed.Service
    """Whichever serves now."""
    dice: random.Random
    seen: dict[str, list[Instant]] = dataclasses.field(default_factory=dict)
    """Quiesced instants, by what came before them."""
    unrecorded: list[Instant] = dataclasses.field(default_factory=list)
    """Of which nothing may be restored."""

    @property
    def repository(self) -> Repository:
        return Repository.open(LocalStore(self.home.path / "repo"))

    @property
    def chains(self) -> list[Chain]:
        return chains(*self.repository.logs(SOURCE))

    def work(self, steps: int = 20) -> None:
        work(client(self.server), self.dice, steps)

    def look(self, since: str) -> None:
        """Work, and stand still, again and again."""
        self.recorded()
        for _ in range(EACH):
            self.work()
            self.seen.setdefault(since, []).append(quiesced(client(self.server)))
        self.recorded()  # what was read of the clock since the last piece is stored with the next one

    def recorded(self) -> None:
        """Until everything of now is in the repository, and can be restored."""
        now = instant(client(self.server)).at

        def reached() -> bool:
            self.work(2)
            bars = (
                bar for w in windows(self.repository.points(SOURCE), self.chains).values() for bar in w.bars
            )
            return any(last >= now for _, last in bars)

        bed.wait_until(reached, timeout=60, what=f"a restore to {now}")

    def step(self, at: datetime) -> Step:
        (step,) = plan_restore(self.repository.points(SOURCE), at, [SOURCE], logs=self.chains).steps
        return step


def restart(life: Life) -> None:
    """With what it keeps on its disk."""
    life.server.container.restart(timeout=20)
    bed.wait_until(lambda: bed.redis_answers(life.server), timeout=30, what="the server again")


def fail_over(life: Life, replica: bed.Service) -> None:
    """The master is gone for good, its replica takes over, and its address leads there."""
    last = instant(client(life.server))
    bed.wait_until(
        lambda: instant(client(replica)).offset == last.offset == instant(client(life.server)).offset,
        timeout=20, what="the replica to be where its master is",
    )  # fmt: skip
    life.lead.to(None)
    life.server.container.kill()
    client(replica).execute_command("REPLICAOF", "NO", "ONE")
    life.server = replica
    life.lead.to((replica.host, replica.port))


def lose_backlog(life: Life) -> None:
    """More is written than the server keeps, and nobody records it."""
    one = client(life.server)
    one.config_set("repl-backlog-size", "16kb")
    for _ in range(3):
        life.work()
        life.unrecorded.append(instant(one))
        one.set("large", "x" * 100_000)
    one.config_set("repl-backlog-size", "64mb")


@pytest.fixture(scope="module")
def life(module_services: bed.Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """Lived once, for all that is asked of it; the agent still records."""
    port, free = bed.free_ports(2)
    network = module_services.network()
    first = module_services.redis(*SETTINGS, network=network, aliases=["first"], published=port)
    follow = ("--replicaof", "first", "6379")
    replica = module_services.redis(*SETTINGS, *follow, network=network, aliases=["second"])
    home = Home(tmp_path_factory.mktemp("exact"))
    with Lead() as lead:
        lead.to((first.host, first.port))
        config = CONFIG.format(host="127.0.0.1", port=lead.port, free=free).replace("backupd:secret@", "")
        home.configure(config)
        home.ok("init")
        life = Life(home, lead, first, random.Random(7))
        life.work(300)
        with serving(home):
            life.look("the beginning")
            client(first).client_kill_filter(_type="replica")
            life.work()
            life.look("a link that was cut")
        life.work()
        with serving(home):  # the first one was killed
            life.look("an agent that was killed")
            restart(life)
            life.look("a restart of the server")
        lose_backlog(life)
        with serving(home) as agent:
            life.look("a stream that was lost")
            fail_over(life, replica)
            life.look("a failover")
            yield life
            agent.terminate()
            assert agent.wait(timeout=30) == 0


def feeds(life: Life, instants: list[Instant]) -> Iterator[tuple[list[Instant], Fed]]:
    """What restores to these instants feed a server, together where they begin with the same point."""
    repository, steps = life.repository, [(one, life.step(one.at)) for one in instants]
    for point in {step.point.id: step.point for _, step in steps}.values():
        archive = open_archive(repository, point)
        logs = []
        of_it = [(one, step) for one, step in steps if step.point == point]
        for one, step in of_it:
            read = partial(read_logs, repository, step.logs)
            landing = find_landing(archive, read, step.replay_to)
            assert landing.at is not None and landing.at <= one.at
            first, *rest = up_to(landing.position, Replay(point, step.replay_to), read)
            logs.append(b"".join(rest))
        start: Any = point.attributes["start"]
        yield [one for one, _ in of_it], Fed(b"".join(archive.read("dump.rdb")), start, first, logs)


def test_each_instant_brings_back_exactly_what_the_server_held(life: Life, services: bed.Services) -> None:
    """Every type of value, several databases, times to live, scripts, functions and transactions; across all that
    befell the link, the agent and the servers."""
    instants = [one for group in life.seen.values() for one in group]
    assert len(instants) == 6 * EACH
    assert len({one.held for one in instants}) == len(instants), "the workload must change something"
    fresh = services.redis(*SETTINGS)
    here: dict[Instant, tuple[str, ...]] = {}
    for those, fed in feeds(life, instants):
        held = held_after_each(client(fresh), seen_from(fresh.host, fresh.port), fed)
        here |= dict(zip(those, held, strict=True))
    wrong = {
        since: [n for n, one in enumerate(group) if here[one] != one.held]
        for since, group in life.seen.items()
    }
    assert wrong == {since: [] for since in life.seen}


def test_nothing_but_the_lost_stream_tore_the_window(life: Life) -> None:
    """A new name of the history, after a restart and after a failover, continues the old one."""
    found = bars(life.home, SOURCE)
    assert len(found) == 2
    one, other = ([part.epoch for part in chain.parts] for chain in life.chains)
    assert len(set(one)) == len(set(other)) == 2
    assert one[-1] == other[0] or other[-1] == one[0]


def test_an_instant_of_which_nothing_was_recorded_is_refused_with_the_window(life: Life) -> None:
    before, after = (
        datetime.fromisoformat(bar[end])
        for bar, end in zip(bars(life.home, SOURCE), ("last", "first"), strict=True)
    )
    for one in life.unrecorded:
        assert before < one.at < after
        with pytest.raises(NoRecoveryPoint, match="where the log has a hole") as refused:
            life.step(one.at)
        for near in (before, after):
            assert near.astimezone(UTC).isoformat().replace("+00:00", "Z") in refused.value.hint
    told = life.home.refused("restore", "--at", life.unrecorded[0].at.isoformat(), SOURCE, code=21)
    assert "where the log has a hole" in told.message


def test_a_running_server_goes_back_by_the_command_line_and_is_recorded_from_there(life: Life) -> None:
    """To before its own life began: it was a replica then. Not a write more, not one less."""
    wanted = life.seen["a restart of the server"][3]
    torn = len(bars(life.home, SOURCE))
    argv = ("restore", "--at", wanted.at.isoformat(), SOURCE, "--to", "in-place", "--json")
    (done,) = life.home.ok(*argv).json["restored"]
    assert instant(client(life.server)).held == wanted.held
    assert done["recovered"]["expired"] == 0
    assert wanted.at - datetime.fromisoformat(done["recovered"]["as_of"]) < timedelta(seconds=0.3)
    life.look("a restore in place")
    assert len(bars(life.home, SOURCE)) == torn + 1
