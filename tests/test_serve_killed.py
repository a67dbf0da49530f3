"""`backupd serve` on a real repository: told to stop, killed at every stage, late, failing, without a store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import services as bed

from backupd.agent import build
from backupd.agent.serving import jobs_of
from backupd.catalog import Catalog
from backupd.config import load
from backupd.errors import Interrupted
from backupd.model import RecoveryPoint, Run, RunStatus, Silence
from backupd.scheduler import Scheduler
from backupd.stores.local import LocalStore
from backupd.verify import verify

STAGES = Path(__file__).parent / "stages.py"
BIG = 20 << 20
FIRST = b"what the first backup found\n"


def free_port() -> int:
    return bed.free_ports(1)[0]


@dataclass
class Setup:
    """One agent's configuration, state, repository and data below a directory."""

    root: Path
    port: int

    @property
    def config(self) -> Path:
        return self.root / "backupd.toml"

    @property
    def trace(self) -> Path:
        return self.root / "trace"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write(
        self, sources: Mapping[str, Path], *, repository: str = "repository", grace: str = "5s"
    ) -> None:
        tables = "".join(
            f'[sources.{n}]\ndriver = "volume"\npath = "{path}"\n' for n, path in sources.items()
        )
        self.config.write_text(
            f'state = "state"\n[repository]\n{repository_lines(repository)}\n'
            f'[defaults]\nschedule = "0 2 * * *"\n{tables}'
            f'[serve]\nlisten = "127.0.0.1:{self.port}"\ngrace = "{grace}"\nverify_schedule = "never"\n'
        )

    def points(self, source: str = "files") -> list[RecoveryPoint]:
        return build(load(self.config, {})).repository().points(source)

    def back_up(self, source: str, *, ago: timedelta) -> RecoveryPoint:
        """A backup of some time ago, on record."""
        agent = build(load(self.config, {}), clock=lambda: datetime.now(UTC) - ago)
        run = agent.back_up(source, Silence())
        agent.catalog.record(run)
        agent.catalog.close()
        return agent.repository().find(run.point)

    def history(self) -> list[Run]:
        """Oldest first."""
        catalog = Catalog(self.root / "state" / "catalog.sqlite")
        try:
            return catalog.runs()[::-1]
        finally:
            catalog.close()

    def statuses(self) -> list[str]:
        return [f"{run.job} {run.source} {run.status.value}" for run in self.history()]

    def verified(self) -> list[str]:
        """What reading every byte of the repository finds wrong."""
        repository = build(load(self.config, {})).repository()
        return list(verify(repository, sources=None, data_percent=100, progress=Silence()).problems)

    def strays(self) -> list[str]:
        """Files that only a living process may have."""
        found = [*self.root.rglob("+tmp-*"), *self.root.rglob("*.alive-*"), *self.root.rglob("*-wal")]
        return [path.name for path in found]


def repository_lines(location: str) -> str:
    return location if "=" in location else f'location = "{location}"'


@dataclass
class Serving:
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        """Each line is one JSON object, also the last one of a process that was killed."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def until(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        """Wait for something that the running agent brings about."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def end(self, number: int = signal.SIGTERM, seconds: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=seconds)


@contextmanager
def serve(setup: Setup, *, env: Mapping[str, str] | None = None, program: str = "") -> Iterator[Serving]:
    """A real `backupd serve`; `program` is tests/stages.py where its stages matter."""
    log = setup.root / f"serve-{time.monotonic_ns()}.log"
    command = [sys.executable, program] if program else [sys.executable, "-m", "backupd"]
    arguments = ["--config", str(setup.config)] if setup.config.exists() else []
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("BACKUP", "STAGES"))}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "serve", *arguments],
            cwd=setup.root,
            stderr=file,
            stdout=file,
            env={**clean, "STAGES_TRACE": str(setup.trace), **(env or {})},
        )
    try:
        yield Serving(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """A repository with a point of two days ago; since then a big file came: two packs to write."""
    made = Setup(tmp_path / "agent", free_port())
    data = tmp_path / "data"
    for directory in (data, made.root):
        directory.mkdir()
    (data / "first").write_bytes(FIRST)
    made.write({"files": data}, grace="500ms")
    build(load(made.config, {})).create_repository()
    made.back_up("files", ago=timedelta(days=2))
    (data / "big").write_bytes(os.urandom(BIG))
    return made


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


# --- told to stop ------------------------------------------------------------------------------------------


def test_sigterm_lets_a_backup_finish_within_the_grace(setup: Setup) -> None:
    setup.config.write_text(setup.config.read_text().replace("500ms", "20s"))
    with serve(setup, program=str(STAGES), env={"STAGES_HOLD": "packs written"}) as agent:
        agent.until(lambda: setup.trace.exists() and "packs written" in setup.trace.read_text())
        agent.process.send_signal(signal.SIGTERM)
        agent.until(lambda: agent.said("stopping"))
        setup.trace.with_name("trace.go").touch()
        assert agent.process.wait(timeout=20) == 0
    assert setup.statuses() == ["backup files ok", "backup files missed", "backup files ok"]
    assert len(setup.points()) == 2
    assert setup.verified() == []
    assert setup.strays() == []
    assert agent.lines()[-1]["message"] == "stopped"


def test_sigterm_abandons_a_backup_that_outlasts_the_grace_and_no_half_point_is_left(setup: Setup) -> None:
    before = setup.points()
    with serve(setup, program=str(STAGES), env={"STAGES_HOLD": "packs written"}) as agent:
        agent.until(lambda: setup.trace.exists() and "packs written" in setup.trace.read_text())
        agent.process.send_signal(signal.SIGTERM)
        agent.until(lambda: agent.said("telling the work to stop"))
        setup.trace.with_name("trace.go").touch()
        assert agent.process.wait(timeout=20) == 0
    assert setup.statuses() == ["backup files ok", "backup files missed", "backup files abandoned"]
    assert "told to stop" in setup.history()[-1].message
    assert setup.points() == before
    assert setup.strays() == []
    assert [line for line in agent.lines() if line["level"] == "error"] == []
    with serve(setup) as agent:  # and what was abandoned is done at the next start
        agent.until(lambda: setup.statuses()[-1] == "backup files ok")
        assert agent.end() == 0
    assert setup.verified() == []


def test_prune_and_verify_end_soon_when_told_to(setup: Setup) -> None:
    """They may take hours; what they did not come to is done at their next time."""
    text = setup.config.read_text().replace('"0 2 * * *"', '"0 2 * * *"\nretention = { last = 1 }')
    setup.config.write_text(text.replace('"never"', '"30 4 * * SUN"'))
    setup.back_up("files", ago=timedelta())
    jobs = {job.name: job for job in jobs_of(build(load(setup.config, {})))}
    stop = threading.Event()
    stop.set()
    for name in ("prune", "verify"):
        with pytest.raises(Interrupted):
            jobs[name].work(stop, None)
    assert len(setup.points()) == 2
    for name in ("prune", "verify"):
        assert jobs[name].work(threading.Event(), None).status is RunStatus.OK
    assert len(setup.points()) == 1


def test_an_idle_agent_ends_at_once(setup: Setup) -> None:
    setup.back_up("files", ago=timedelta())
    with serve(setup) as agent:
        agent.until(lambda: agent.said("started: "))
        began = time.monotonic()
        assert agent.end() == 0
        assert time.monotonic() - began < 8  # docker kills after ten
    assert setup.strays() == []


# --- killed ------------------------------------------------------------------------------------------------


def test_killed_at_any_stage_nothing_half_done_counts_and_the_next_start_makes_it_good(
    setup: Setup, tmp_path: Path
) -> None:
    """SIGKILL at each stage in turn, from the first record of the run to the last."""
    whole = Setup(tmp_path / "whole", setup.port)
    shutil.copytree(setup.root, whole.root)
    with serve(whole, program=str(STAGES)) as agent:
        agent.until(lambda: agent.said("backup files ok"))
        assert agent.end() == 0
    stages = whole.trace.read_text().splitlines()
    assert (stages[0], stages[-1]) == ("record missed", "record ok")
    assert {"capture", "packs written", "packs named", "points written", "points named"} <= set(stages)
    assert stages.count("packs named") >= 2
    firsts = {name: number for number, name in reversed(list(enumerate(stages)))}
    lasts = {name: number for number, name in enumerate(stages)}
    for number in sorted({*firsts.values(), *lasts.values()}):
        check_kill(setup, Setup(tmp_path / f"killed-{number}", setup.port), number)


def start_here(setup: Setup) -> None:
    agent = build(load(setup.config, {}))
    agent.catalog.learn(agent.repository().points())
    scheduler = Scheduler(jobs_of(agent), agent.catalog, clock=agent.clock)
    scheduler.start()
    while scheduler._active:
        time.sleep(0.01)
    assert scheduler.stop(grace=20)
    assert not scheduler.health().problems
    agent.catalog.close()


def check_kill(setup: Setup, copy: Setup, number: int) -> None:
    shutil.copytree(setup.root, copy.root)
    with serve(copy, program=str(STAGES), env={"STAGES_KILL": str(number)}) as agent:
        assert agent.process.wait(timeout=30) == -signal.SIGKILL
        assert agent.lines()[0]["level"] == "info"
    stages = copy.trace.read_text().splitlines()
    begun, finished, recorded = (name in stages for name in ("recorded running", "points named", "record ok"))
    assert recorded <= finished
    points = copy.points()
    assert points[:1] == setup.points() and len(points) == 1 + finished, stages
    assert copy.verified() == [], stages

    if stages[-1] in ("packs named", "points named"):
        with serve(copy) as agent:
            agent.until(lambda: agent.said("started: ") and copy.statuses()[-1] == "backup files ok")
            assert get(copy.url + "/healthz")[0] == 200
            assert agent.end() == 0
        assert agent.said("was cut off") == begun
    else:
        start_here(copy)  # as `serve` does it, without the second that a new process takes
    assert ("backup files abandoned" in copy.statuses()) == begun, stages
    assert "backup files running" not in copy.statuses()
    points = copy.points()
    assert len(points) == 2 and points[-1].size == len(FIRST) + BIG, stages
    assert copy.verified() == []
    # what a killed writer left is no object, and goes once no slow writer can still be at it
    LocalStore(copy.root / "repository").sweep(older_than=0)
    assert copy.strays() == []
    shutil.rmtree(copy.root)


def test_what_was_missed_while_the_agent_was_away_is_caught_up_and_recorded(setup: Setup) -> None:
    with serve(setup) as agent:
        agent.until(lambda: agent.said("backup files ok"))
        assert agent.end() == 0
    ok, missed, caught_up = setup.history()
    assert (ok.status, missed.status, caught_up.status) == (RunStatus.OK, RunStatus.MISSED, RunStatus.OK)
    assert missed.due == caught_up.due is not None
    assert agent.said("was missed")
    with serve(setup) as agent:
        agent.until(lambda: agent.said("started: "))
        assert agent.end() == 0
    assert len(setup.history()) == 3


def test_a_lost_history_is_no_reason_to_back_up_again(setup: Setup) -> None:
    setup.back_up("files", ago=timedelta())
    shutil.rmtree(setup.root / "state")
    with serve(setup) as agent:
        agent.until(lambda: agent.said("started: "))
        assert agent.end() == 0
    assert [run.id.split("-")[0] for run in setup.history()] == ["point", "point"]


# --- failing and late --------------------------------------------------------------------------------------


def test_each_failing_source_is_named_outside_and_a_good_one_hides_none(setup: Setup, tmp_path: Path) -> None:
    """In the health page, in the exit code of a command, in the log, in the history."""
    empty, gone = tmp_path / "empty", tmp_path / "gone"
    empty.mkdir()
    good = {name: tmp_path / name for name in ("a", "z")}
    for directory in good.values():
        directory.mkdir()
        (directory / "file").write_text("content")
    setup.write({"a": good["a"], "empty": empty, "files": tmp_path / "data", "gone": gone, "z": good["z"]})
    with serve(setup) as agent:
        agent.until(lambda: len([s for s in setup.statuses() if s.endswith(("failed", "ok"))]) == 6)
        status, health = get(setup.url + "/healthz")
        assert status == 503 and health["status"] == "failing"
        assert {p["source"] for p in health["problems"]} == {"empty", "gone"}
        assert {p["problem"] for p in health["problems"]} == {"failing", "overdue"}
        assert get(setup.url + "/livez")[0] == 200
        assert agent.end() == 0
    errors = {line["source"] for line in agent.lines() if line["level"] == "error"}
    assert errors == {"empty", "gone"}
    failed = [run for run in setup.history() if run.status is RunStatus.FAILED]
    assert all("hint:" in run.message for run in failed) and len(failed) == 2

    for names in (["a", "gone", "z"], ["gone", "a"], ["a", "empty"]):
        done = subprocess.run(
            [sys.executable, "-m", "backupd", "--config", setup.config, "backup", *names],
            check=False,
            capture_output=True,
        )
        assert done.returncode == 20, done.stderr
        assert b"hint:" in done.stderr

    gone.mkdir()
    (gone / "file").write_text("it is back")
    (empty / "file").write_text("no longer empty")
    with serve(setup) as agent:
        agent.until(lambda: get_or_none(setup.url + "/healthz") == 200 and not at_work(setup))
        assert agent.end() == 0


def get_or_none(url: str) -> int | None:
    try:
        return get(url)[0]
    except OSError:
        return None


def at_work(setup: Setup) -> bool:
    """Also right after the start, when health is still kind to what is being caught up."""
    jobs = get(setup.url + "/status")[1]["jobs"]
    last = [job["last"]["status"] for job in jobs if job["job"] == "backup" and job["last"]]
    return any(job["doing"] for job in jobs) or set(last) != {"ok"}


def test_without_its_repository_the_agent_stays_says_so_and_still_ends_when_told(
    setup: Setup, tmp_path: Path
) -> None:
    endpoint = f'location = "s3://bucket/prefix"\nendpoint_url = "http://127.0.0.1:{free_port()}"'
    keys = 'region = "us-east-1"\naccess_key_id = "x"\nsecret_access_key = "super-secret-key"'
    setup.write({"files": tmp_path / "data"}, repository=f"{endpoint}\n{keys}", grace="500ms")
    with serve(setup) as agent:
        agent.until(lambda: agent.said("began"))
        assert get(setup.url + "/livez")[0] == 200
        began = time.monotonic()
        agent.end()
        assert time.monotonic() - began < 8  # docker kills after ten
    assert setup.statuses()[-1] in ("backup files abandoned", "backup files failed")
    assert not agent.said("super-secret-key")


def test_two_agents_on_one_address_the_second_says_why(setup: Setup) -> None:
    with serve(setup) as agent:
        agent.until(lambda: agent.said("health at"))
        with serve(setup) as second:
            assert second.process.wait(timeout=20) == 2
        assert str(setup.port) in second.log.read_text() and "hint" in second.log.read_text()


# --- as the old cron container -----------------------------------------------------------------------------


def test_two_variables_and_a_mount_are_enough(tmp_path: Path) -> None:
    """Without a file, and the repository is made where there is none."""
    (tmp_path / "backup" / "uploads").mkdir(parents=True)
    (tmp_path / "backup" / "uploads" / "picture").write_bytes(b"x" * 1000)
    (tmp_path / "backups").mkdir()
    bare = Setup(tmp_path / "agent", free_port())
    bare.root.mkdir()
    env = {
        "BACKUP_SCHEDULE": "0 3 * * 0",
        "RETENTION_DAYS": "30",
        "BACKUPD_BACKUP_ROOT": str(tmp_path / "backup"),
        "BACKUPD_REPOSITORY": str(tmp_path / "backups"),
        "BACKUPD_STATE": str(bare.root / "state"),
    }
    with serve(bare, env=env) as agent:
        agent.until(lambda: agent.said("backup uploads ok"))
        assert agent.end() == 0
    assert bare.statuses() == ["backup uploads ok"]
    assert len(list((tmp_path / "backups" / "points" / "uploads").iterdir())) == 1


# --- what stands still -------------------------------------------------------------------------------------

PAUSE = """
    import os, signal, sys, time
    from backupd.drivers._pause import default_notes, paused
    from backupd.sandbox.engine import Engine
    with paused(Engine().container(sys.argv[1]), default_notes()):
        print("paused", flush=True)
        if sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.stdin.read()
"""


@contextmanager
def pausing(container: str, env: Mapping[str, str], then: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PAUSE), container, then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **env},
    )
    assert process.stdout is not None and process.stdin is not None
    with process:
        assert process.stdout.readline() == b"paused\n"
        yield process
        process.stdin.close()


def test_a_container_left_paused_by_a_killed_agent_goes_on_at_the_next_start(
    setup: Setup, services: bed.Services, tmp_path: Path
) -> None:
    """One that a living agent has paused at this moment stands still until that is done."""
    setup.back_up("files", ago=timedelta())
    left, held = services.redis(), services.redis()
    env = {"XDG_STATE_HOME": str(tmp_path / "xdg")}

    def status(service: bed.Service) -> str:
        service.container.reload()
        return str(service.container.status)

    with pausing(left.name, env, "die") as process:
        assert process.wait(timeout=20) == -signal.SIGKILL
    assert status(left) == "paused"
    with pausing(held.name, env, "wait"), serve(setup, env=env) as agent:
        agent.until(lambda: agent.said("started: "))
        assert (status(left), status(held)) == ("running", "paused")
        assert agent.end() == 0
    assert status(held) == "running"
    assert agent.said("was left paused")
