"""The agent as a process: signals, kills, its health page."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from backupd.catalog import Catalog
from backupd.errors import UsageError
from backupd.web import StatusServer, Text, probe

ANYWHERE = ("127.0.0.1", 0)
ROOT = Path(__file__).parent.parent


# --- the page ----------------------------------------------------------------------------------------------


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_health_is_200_when_good_and_503_with_the_reasons_otherwise() -> None:
    health: list[tuple[bool, Any]] = [(True, {"status": "ok"})]
    with StatusServer(ANYWHERE, {"healthz": lambda: health[0]}) as server:
        assert get(server.url + "/healthz") == (200, {"status": "ok"})
        assert probe(server.url + "/healthz") == 0
        health[0] = (False, {"status": "failing", "problems": [{"source": "orders", "problem": "overdue"}]})
        status, answer = get(server.url + "/healthz")
        assert status == 503
        assert answer["problems"][0]["source"] == "orders"
        assert probe(server.url + "/healthz") == 1
    assert probe(server.url + "/healthz") == 1  # nobody is there any more


def test_a_page_that_breaks_is_a_503_and_not_the_end() -> None:
    def broken() -> tuple[bool, Any]:
        raise RuntimeError("a bug")

    with StatusServer(ANYWHERE, {"healthz": broken}) as server:
        assert get(server.url + "/healthz")[0] == 503
        assert get(server.url + "/healthz")[1]["error"] == "RuntimeError: a bug"


def test_a_page_may_be_text() -> None:
    page = Text(b"up 1\n", "text/plain")
    with (
        StatusServer(ANYWHERE, {"metrics": lambda: (True, page)}) as server,
        urllib.request.urlopen(server.url + "/metrics", timeout=5) as answer,
    ):
        assert (answer.read(), answer.headers["Content-Type"]) == (page.content, page.content_type)


def test_other_paths_and_methods_are_refused_and_head_has_no_body() -> None:
    with StatusServer(ANYWHERE, {"healthz": lambda: (True, {})}) as server:
        assert get(server.url + "/etc/passwd")[0] == 404
        assert get(server.url + "/")[1]["pages"] == ["/healthz"]
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
        for method, status in (("HEAD", 200), ("POST", 501), ("DELETE", 501)):
            connection.request(method, "/healthz")
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == status
            assert method != "HEAD" or body == b""
            assert "Python" not in (answer.getheader("Server") or "")
        connection.close()


def test_a_client_that_says_nothing_keeps_nobody_else_waiting() -> None:
    with StatusServer(ANYWHERE, {"healthz": lambda: (True, {})}) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))):
            assert get(server.url + "/healthz")[0] == 200


def test_an_address_in_use_is_told_with_a_hint() -> None:
    with StatusServer(ANYWHERE, {}) as server:
        taken = server.url.removeprefix("http://")
        host, port = taken.split(":")
        with pytest.raises(UsageError) as raised, StatusServer((host, int(port)), {}):
            pass
    assert taken in raised.value.message
    assert "listen" in raised.value.hint


def test_it_listens_on_ipv6_too() -> None:
    with StatusServer(("::1", 0), {"healthz": lambda: (True, {})}) as server:
        assert server.url.startswith("http://[::1]:")
        assert probe(server.url + "/healthz") == 0


def test_a_probe_reads_no_file() -> None:
    assert probe("file:///etc/passwd") == 1
    assert probe("nonsense") == 1


# --- a process that is told to stop ------------------------------------------------------------------------

AGENT = """
    import signal, sys, threading, time
    from datetime import UTC, datetime, timedelta
    from pathlib import Path
    from backupd import log
    from backupd.catalog import Catalog
    from backupd.errors import Interrupted
    from backupd.model import Run, RunStatus
    from backupd.scheduler import Job, Schedule, Scheduler, run_until_stopped
    from backupd.web import StatusServer

    log.configure("json")
    clock = lambda: datetime.now(UTC)
    seconds, grace, abandon = map(float, sys.argv[2:5])
    listens = sys.argv[5] == "listens"

    def work(stop, due):
        end = time.monotonic() + seconds
        print("working", flush=True)
        while time.monotonic() < end:
            time.sleep(0.02)
            if listens and stop.is_set():
                raise Interrupted("told to stop")
        return Run("own", "backup", "orders", RunStatus.OK, clock(), clock(), point="p1")

    catalog = Catalog(Path(sys.argv[1]))
    jobs = [Job("backup", "orders", work, Schedule.parse("0 2 * * *"))]
    scheduler = Scheduler(jobs, catalog, clock=clock)
    health = lambda: (scheduler.health().healthy, scheduler.health().json())
    page = StatusServer(("127.0.0.1", 0), {"healthz": health})
    code = run_until_stopped(scheduler, grace=grace, abandon=abandon, beside=[page])
    catalog.close()
    sys.exit(code)
"""


class Agent:
    def __init__(self, process: subprocess.Popen[str], stderr: Path) -> None:
        self.process = process
        self._stderr = stderr

    def lines(self) -> list[dict[str, Any]]:
        """Its log; every line is one JSON object."""
        return [json.loads(line) for line in self._stderr.read_text().splitlines()]

    def signal_and_wait(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Its exit code, and the seconds it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(timeout=30), time.monotonic() - began


@contextmanager
def small_agent(
    path: Path, seconds: float, *, grace: float, abandon: float = 4, listens: bool = True
) -> Iterator[Agent]:
    """An agent whose one backup takes `seconds`; entered once that is at work."""
    stderr = path.with_suffix(".log")
    arguments = [str(path), str(seconds), str(grace), str(abandon), "listens" if listens else "deaf"]
    with stderr.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(AGENT), *arguments],
            stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "working\n", stderr.read_text()
        yield Agent(process, stderr)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def history(path: Path) -> list[tuple[str, str]]:
    catalog = Catalog(path)
    try:
        return [(run.status.value, run.message) for run in reversed(catalog.runs())]
    finally:
        catalog.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_run_at_hand_finish_and_ends_with_0(path: Path, number: int) -> None:
    with small_agent(path, 0.8, grace=10) as agent:
        code, _ = agent.signal_and_wait(number)
    assert code == 0
    assert history(path) == [("ok", "")]
    messages = [line["message"] for line in agent.lines()]
    assert messages[-1] == "stopped"
    assert any("recovery point p1" in message for message in messages)
    assert sorted(p.name for p in path.parent.iterdir()) == ["catalog.log", "catalog.sqlite"]


def test_a_run_longer_than_the_grace_is_abandoned_and_the_end_is_still_clean(path: Path) -> None:
    with small_agent(path, 30, grace=0.3) as agent:
        code, seconds = agent.signal_and_wait()
    assert code == 0
    assert 0.3 <= seconds < 25
    assert history(path) == [("abandoned", "told to stop")]


def test_a_run_that_does_not_listen_is_cut_off_and_the_code_says_so(path: Path) -> None:
    with small_agent(path, 30, grace=0.2, abandon=0.3, listens=False) as agent:
        code, seconds = agent.signal_and_wait()
    assert code == 1
    assert seconds < 25
    assert [status for status, _ in history(path)] == ["abandoned"]


def test_a_second_signal_ends_it_at_once(path: Path) -> None:
    with small_agent(path, 30, grace=30, listens=False) as agent:
        agent.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        code, seconds = agent.signal_and_wait()
    assert code == 130
    assert seconds < 25  # of the 30 that the run would have taken
    assert [status for status, _ in history(path)] == ["running"]  # nobody could say more; the next one will


def test_the_lines_of_a_run_carry_its_id_and_its_source(path: Path) -> None:
    with small_agent(path, 0.2, grace=10) as agent:
        agent.signal_and_wait()
    about = [line for line in agent.lines() if line.get("run")]
    assert {line["source"] for line in about} == {"orders"}
    assert len({line["run"] for line in about}) == 1
    assert all(line["time"].endswith("Z") and line["level"] for line in agent.lines())


def test_an_agent_killed_at_work_is_seen_by_the_next_which_does_its_work(path: Path) -> None:
    with small_agent(path, 30, grace=1) as agent:
        assert agent.signal_and_wait(signal.SIGKILL)[0] == -signal.SIGKILL
    with small_agent(path, 0.1, grace=10) as agent:
        url = next(line["message"] for line in agent.lines() if "health at" in line["message"]).split()[-1]
        assert get(url)[0] == 200
        assert agent.signal_and_wait()[0] == 0
    assert [status for status, _ in history(path)] == ["abandoned", "ok"]
    assert any("was cut off" in line["message"] and line["level"] == "error" for line in agent.lines())
    assert not any(os.path.exists(p) for p in path.parent.glob("*.alive-*"))
