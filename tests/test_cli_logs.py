"""The command line over a source whose log is recorded: what can be restored, what a restore would do, what is lost."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from commands import Home, InsideHome
from recording import Account, AccountDriver
from test_recording import Protected, days

from backupd import backup
from backupd.chain import chains
from backupd.logs import LOG_FOLDER, read_logs
from backupd.logs.piece import encode
from backupd.model import LogSpan
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


def pieces(home: Home) -> tuple[Repository, list[LogSpan]]:
    """Those behind the first base, in order."""
    repository = Repository.open(LocalStore(home.path / "repo"))
    first = datetime.fromisoformat(bars(home)[0]["first"])
    spans = [s for s in repository.logs("acc")[0] if s.start < s.end and s.anchor and s.anchor.at > first]
    return repository, sorted(spans, key=lambda span: span.start)


def test_a_lost_object_is_a_hole_that_no_restore_goes_into(home: Home) -> None:
    """Verify tells up to when a restore comes before any begins; a plan behind it is refused with what can be had."""
    _, spans = pieces(home)
    lost = spans[2]
    (home.path / "repo" / log_key(lost)).unlink()
    assert spans[1].anchor
    assert f"restores come up to {spans[1].anchor.at:%Y-%m-%d %H:%M:%S}" in home.run("verify").out
    assert lost.anchor
    ended = home.refused("restore", "acc", "--at", format_instant(lost.anchor.at), "--to", "dir:out", code=21)
    assert "hole" in ended.message
    assert format_instant(spans[1].anchor.at) in ended.hint
    assert not (home.path / "out").exists()


def test_a_torn_object_stops_a_restore_before_it_makes_anything(home: Home) -> None:
    _, spans = pieces(home)
    path = home.path / "repo" / log_key(spans[2])
    path.write_bytes(path.read_bytes()[:-3])
    assert home.run("verify").code == 22
    assert spans[2].anchor
    at = format_instant(spans[2].anchor.at)
    for command in (["plan", "acc", "--at", at], ["restore", "acc", "--at", at, "--to", "dir:out"]):
        ended = home.refused(*command, code=22)
        assert "is damaged" in ended.message
        assert spans[1].anchor
        assert f"restores come up to {spans[1].anchor.at:%Y-%m-%d %H:%M:%S}" in ended.hint
    assert list((home.path / "out").iterdir() if (home.path / "out").exists() else []) == []


def test_a_doubled_object_is_told_and_one_that_differs_stops_a_restore(home: Home) -> None:
    repository, spans = pieces(home)
    span, start = spans[2], spans[1].start
    good = b"".join(data for _, data in read_logs(repository, spans[1:3]))
    for content, code in ((good, 0), (bytes(len(good)), 22)):
        stored, _ = encode(repository.codec, [content], [])
        double = LogSpan("acc", span.epoch, start, span.end, None, len(stored))
        repository.put_log(double, stored)
        assert home.run("verify").code == code
        assert span.anchor
        at = format_instant(span.anchor.at)
        assert home.run("plan", "acc", "--at", at).code == code
        ended = home.run("restore", "acc", "--at", at, "--to", f"dir:out{code}")
        assert ended.code == code or (code, ended.code) == (0, 3)  # the log lies beside the files
        if code:
            assert "different bytes" in ended.message
        repository.store.delete(log_key(double))


def test_an_instant_without_a_zone_is_one_of_the_configured_zone_wherever_the_machine_is(home: Home) -> None:
    """Echoed in UTC before anything starts; what the log does not reach is refused with the window."""
    home.configure(CONFIG + '[defaults]\ntimezone = "Europe/Berlin"\n')
    at = datetime.fromisoformat(bars(home)[0]["last"]).replace(microsecond=0)
    naive = at.astimezone(ZoneInfo("Europe/Berlin")).replace(tzinfo=None).isoformat(" ")
    assert naive != at.replace(tzinfo=None).isoformat(" ")
    for zone in ("Europe/Berlin", "America/New_York", "UTC"):
        plan = Home(home.path, {"TZ": zone}).ok("plan", "acc", "--at", naive)
        assert f"at {format_instant(at)}" in plan.out + plan.err
    first, last = bars(home)[0]["first"], bars(home)[-1]["last"]
    early = home.refused("plan", "acc", "--at", "2026-01-01 00:00", code=21)
    assert "2025-12-31T23:00:00Z is before" in early.message
    assert f"--at {first}" in early.hint
    late = home.refused("restore", "acc", "--at", "now", "--to", "dir:out", code=21)
    assert "after the last instant that was recorded" in late.message
    assert f"--at {last} before" in late.hint


def test_the_log_of_a_source_that_no_driver_here_records_is_not_backed_up_as_a_dump(home: Home) -> None:
    """Whatever this version can do with mode = "pitr": it never makes a dump of it in silence."""
    assert home.run("backup", "acc").code != 0


def test_latest_is_shown_as_the_instant_it_is(home: Home) -> None:
    repository = Repository.open(LocalStore(home.path / "repo"))
    reach = max(c.reach for c in chains(*repository.logs("acc")) if c.reach)
    assert format_instant(reach) in home.ok("plan", "acc", "--at", "latest").out
    assert reach != LATEST
