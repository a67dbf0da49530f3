"""The command line over a source whose log is recorded: what can be restored, what a restore would do, what is lost."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from commands import Home, InsideHome
from recording import Account, AccountDriver
from test_recording import Protected, days

from backupd import backup
from backupd.chain import chains
from backupd.logs import LOG_FOLDER
from backupd.plan import LATEST, format_instant
from backupd.repository import Repository, log_key
from backupd.stores import LocalStore

CONFIG = """
[repository]
location = "repo"
[sources.data]
driver = "volume"
path = "data"
[sources.acc]
driver = "postgres"
url = "postgresql://backup@nowhere/x"
mode = "pitr"
"""


class Recorded(Protected):
    """A protected account whose repository is a directory."""

    def __init__(self, path: Path) -> None:
        self.account = Account()
        self.driver = AccountDriver(self.account)
        self.repository = Repository.create(LocalStore(path, create=True), clock=lambda: self.account.now)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, a hole, one more base; made once."""
    home = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backup, "_LOG_PATIENCE", 0.0)
        made = Recorded(home / "repo")
        made.record()
        days(made, 2)
        made.account.move(made.account.now + timedelta(hours=5))
        made.account.kept = len(made.account.log)
        days(made, 1)
    return home


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Home:
    shutil.copytree(template, tmp_path / "home")
    home = InsideHome(tmp_path / "home")
    (home.path / "data").mkdir()
    (home.path / "data" / "file").write_text("x")
    home.configure(CONFIG)
    return home


def bars(home: Home) -> list[dict[str, str]]:
    found: list[dict[str, str]] = home.ok("window", "acc", "--json").json["acc"]["continuous"]
    return found


def test_window_shows_every_stretch_and_draws_it(home: Home) -> None:
    home.ok("backup", "data")
    first, second = bars(home)
    lines = home.ok("window").out.splitlines()
    assert sum("every instant" in line for line in lines) == 2
    for bar in (first, second):
        assert any(bar["first"] in line and bar["last"] in line for line in lines)
    picture = next(line for line in lines if line.startswith("acc") and "#" in line)
    assert "#" in picture.partition(".")[0]
    assert next(line for line in lines if line.startswith("data") and "|" in line)


def test_a_plan_names_the_log_and_its_bytes_and_lands_on_the_instant(home: Home) -> None:
    at = bars(home)[0]["last"]
    plan = home.ok("plan", "acc", "--at", at, "--json").json
    (step,) = plan["steps"]
    assert step["lands_at"] == step["replay_to"] == at
    assert step["skew"] == 0
    assert sum(span["size"] for span in step["logs"]) == step["log_stored"]
    table = home.ok("plan", "acc", "--at", at).out
    assert "LOG TO REPLAY" in table
    assert f"{len(step['logs'])} object" in table
    latest = home.ok("plan", "acc", "--at", "latest", "--json").json["steps"][0]
    assert (latest["lands_at"], latest["replay_to"]) == (bars(home)[-1]["last"], None)


def test_an_instant_in_a_hole_is_refused_with_both_sides(home: Home) -> None:
    first, second = bars(home)
    ended = home.refused(
        "plan", "acc", "--at", first["last"].replace("Z", "").split(".")[0][:-2] + "59Z", code=21
    )
    assert "hole" in ended.message
    assert f"--at {first['last']} before, --at {second['first']} after" in ended.hint


def test_a_restore_into_a_directory_brings_the_log_along(home: Home) -> None:
    ended = home.run("restore", "acc", "--at", bars(home)[0]["last"], "--to", "dir:out")
    assert ended.code == 3
    assert LOG_FOLDER in ended.out
    assert list((home.path / "out" / "acc" / LOG_FOLDER).iterdir())


def test_a_target_is_one_place_in_one_log(home: Home) -> None:
    both = home.refused("restore", "acc", "--target-lsn", "0/1", "--target-xid", "3", code=2)
    assert "exclude each other" in both.message
    home.refused("restore", "acc", "data", "--target-name", "before-the-upgrade", code=2)
    home.ok("backup", "data")
    dump = home.refused("restore", "data", "--target-xid", "7", "--to", "dir:out", code=2)
    assert "pitr" in dump.hint


def test_status_tells_how_much_would_be_lost(home: Home) -> None:
    ended = home.run("status")
    assert ended.code == 3
    assert "RPO NOW" in ended.out
    (acc,) = (p for p in home.run("status", "--json").json if p["source"] == "acc")
    assert acc["lagging"]
    assert acc["rpo"] > 0


def test_verify_names_what_is_lost_of_a_log(home: Home) -> None:
    assert home.ok("verify").out.endswith("all well\n")
    repository = Repository.open(LocalStore(home.path / "repo"))
    spans = [s for s in repository.logs("acc")[0] if s.start < s.end]
    (home.path / "repo" / log_key(spans[3])).unlink()
    ended = home.run("verify")
    assert ended.code == 22
    assert f"missing from {spans[3].start:x}" in ended.out


def test_the_log_of_a_source_that_no_driver_here_records_is_not_backed_up_as_a_dump(home: Home) -> None:
    """Whatever this version can do with mode = "pitr": it never makes a dump of it in silence."""
    assert home.run("backup", "acc").code != 0


def test_latest_is_shown_as_the_instant_it_is(home: Home) -> None:
    repository = Repository.open(LocalStore(home.path / "repo"))
    reach = max(c.reach for c in chains(*repository.logs("acc")) if c.reach)
    assert format_instant(reach) in home.ok("plan", "acc", "--at", "latest").out
    assert reach != LATEST
