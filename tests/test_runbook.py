"""Every command of the runbook is run, in order, on a real small stack; what it is shown to say is what it says.

In the document: blocks of ```console, `$ ` before each command, its output below it (`...` stands for anything;
nothing below means that anything goes). A command must end with 0, or as its comment says: `# ends with 21`.
`<!-- run: ... -->` is run in its place and not shown.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import docker
import pytest
import services as bed
from redis_exact import seen_from

RUNBOOK = Path(__file__).parent.parent / "restore" / "RUNBOOK.md"
PIECE = re.compile(
    r"<!-- run: (?P<hidden>.*?) -->|^ *```console\n(?P<block>.*?)^ *```$", re.DOTALL | re.MULTILINE
)
ENDS = re.compile(r"# ends with (\d+)$")


@dataclass
class Step:
    command: str
    shown: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        match = ENDS.search(self.command)
        return int(match[1]) if match else 0


def steps_of(text: str) -> list[Step]:
    steps: list[Step] = []
    for piece in PIECE.finditer(text):
        if piece["hidden"]:
            steps.append(Step(piece["hidden"]))
            continue
        for line in textwrap.dedent(piece["block"]).splitlines():
            if line.startswith("$ "):
                steps.append(Step(line[2:]))
            else:
                steps[-1].shown.append(line)
    return steps


def carry_out(steps: list[Step], work: Path, results: Path, env: dict[str, str]) -> list[tuple[int, str]]:
    """All in one shell, so that a variable or a directory set by one holds for the next."""
    results.mkdir()
    place = shlex.quote(str(results))
    script = "".join(
        f"{{\n{step.command}\n}} > {place}/{n}.out 2>&1 < /dev/null\necho $? > {place}/{n}.code\n"
        for n, step in enumerate(steps)
    )
    subprocess.run(["bash", "-c", script], cwd=work, env=env, timeout=240, check=False)
    return [
        (int((results / f"{n}.code").read_text()), (results / f"{n}.out").read_text())
        for n in range(len(steps))
    ]


def matches(shown: list[str], said: str) -> bool:
    """`...` in what is shown stands for anything or nothing, also for lines; runs of spaces are one."""
    parts = re.split(r"\s*\.\.\.\s*", squeeze("\n".join(shown)))
    wanted = ".*?".join(re.escape(part) for part in parts)
    return re.search(f"^{wanted}$", squeeze(said), re.DOTALL | re.MULTILINE) is not None


def squeeze(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


CONFIGURATION = """
state = "state"
[repository]
location = "{repository}"
[defaults]
schedule = "0 2 * * *"
retention = {{ last = 10 }}
[sources.orders]
driver = "postgres"
container = "{postgres}"
user = "postgres"
password = "secret"
[sources.sessions]
driver = "redis"
container = "{redis}"
[sources.uploads]
driver = "volume"
path = "uploads"
[stacks.shop]
sources = ["orders", "sessions", "uploads"]
"""


@dataclass
class Shop:
    """Where the runbook is read: a directory with a configuration, and what the shell knows."""

    work: Path
    env: dict[str, str]


@pytest.fixture
def shop(services: bed.Services, tmp_path: Path) -> Shop:
    """Orders in PostgreSQL, sessions in Redis, uploads in a directory: backed up, defaced, backed up again.
    `T` lies between; beside it waits a container that was never started."""
    postgres, redis = services.postgres(db="shop"), services.redis()
    services.container(bed.REDIS_IMAGE, name="fresh-sessions", start=False)
    work = tmp_path / "work"
    (work / "uploads").mkdir(parents=True)
    (work / "uploads" / "logo.svg").write_text("<svg/>\n")
    rows = "CREATE TABLE orders AS SELECT n AS id, n * 10 AS cents FROM generate_series(1, 1200) n"
    postgres.exec("psql", "-U", "postgres", "-d", "shop", "-c", rows)
    redis.exec("redis-cli", "SET", "session:1", "alice")
    backups = tmp_path / "backups"
    text = CONFIGURATION.format(repository=backups, postgres=postgres.name, redis=redis.name)
    (work / "backupd.toml").write_text(text)
    env = {key: os.environ[key] for key in ("HOME", "DOCKER_HOST", "LANG") if key in os.environ}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env |= {"BACKUPS": str(backups), "POSTGRES": postgres.name, "REDIS": redis.name}
    env["AGENT"] = seen_from(redis.host, redis.port)

    def backupd(*argv: str) -> None:
        subprocess.run(["backupd", *argv, "-q"], cwd=work, env=env, check=True)

    backupd("init")
    backupd("backup", "shop")
    env["T"] = datetime.now(UTC).isoformat()
    redis.exec("redis-cli", "SET", "session:1", "mallory")
    postgres.exec("psql", "-U", "postgres", "-d", "shop", "-c", "UPDATE orders SET cents = 0")
    (work / "uploads" / "logo.svg").write_text("defaced\n")
    backupd("backup", "shop")
    return Shop(work, env)


@pytest.fixture
def no_sandbox_left(docker_client: docker.DockerClient, shop: Shop) -> Iterator[None]:
    """The runbook tidies up after itself. What others have made meanwhile is none of our business."""
    yield
    left = named_sandboxes(docker_client)
    for name in left:
        subprocess.run(["backupd", "sandbox", "remove", name], env=shop.env, check=False)
    assert not left


def named_sandboxes(client: docker.DockerClient) -> set[str]:
    named = set(re.findall(r"--name (\S+)", RUNBOOK.read_text()))
    found = client.containers.list(all=True, filters={"label": "backupd.sandbox"}, ignore_removed=True)
    return {container.labels["backupd.sandbox"] for container in found} & named


@pytest.mark.usefixtures("no_sandbox_left")
def test_every_command_of_the_runbook_does_what_it_is_shown_to_do(shop: Shop) -> None:
    steps = steps_of(RUNBOOK.read_text())
    assert len(steps) > 20
    ended = carry_out(steps, shop.work, shop.work.parent / "results", shop.env)
    wrong = [
        f"$ {step.command}\nended with {code}, not {step.code}; it said:\n{said}\n"
        + ("but is shown to say:\n" + "\n".join(step.shown) if step.shown else "")
        for step, (code, said) in zip(steps, ended, strict=True)
        if code != step.code or (step.shown and not matches(step.shown, said))
    ]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(
    ("shown", "said", "match"),
    [
        (["a ... c"], "a b c", True),
        (["a", "...", "z"], "a\nm\nn\nz", True),
        (["SIZE  NAME"], "SIZE     NAME\nmore", True),
        (["SOURCE ... SIZE ..."], "SOURCE SIZE", True),
        (["a", "... z", "end"], "a\nz", False),
        (["a.c"], "abc", False),
        (["gone"], "here", False),
    ],
)
def test_what_is_shown_is_compared_with_what_was_said(shown: list[str], said: str, match: bool) -> None:
    assert matches(shown, said) is match


def test_steps_are_found_in_order() -> None:
    text = (
        "<!-- run: T=1 -->\n```console\n$ one\nout\n$ two   # ends with 3\n```\n"
        "```toml\n$ not this\n```\n<!-- run: three -->"
    )
    found = [(step.command, step.shown, step.code) for step in steps_of(text)]
    assert found == [("T=1", [], 0), ("one", ["out"], 0), ("two   # ends with 3", [], 3), ("three", [], 0)]
