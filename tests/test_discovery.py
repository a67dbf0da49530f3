"""Discovery: what runs here becomes a configuration that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Home
from conftest import StartService
from hypothesis import given
from hypothesis import strategies as st

from backupd.config import parse
from backupd.discovery import Found, discover, driver_of, starter
from backupd.sandbox.engine import ContainerInfo, Mount


def container(name: str, image: str, **more: object) -> ContainerInfo:
    return ContainerInfo(name, image, **{"status": "running", **more})  # type: ignore[arg-type]


def volume(name: str, at: str = "/data", *, writable: bool = True) -> Mount:
    return Mount("volume", name, f"/var/lib/docker/volumes/{name}/_data", at, writable)


@pytest.mark.parametrize(
    ("image", "driver"),
    [
        ("postgres:16", "postgres"), ("postgres", "postgres"), ("docker.io/library/postgres:18-alpine", "postgres"),
        ("postgis/postgis:16-3.4", "postgres"), ("timescale/timescaledb:latest-pg16", "postgres"),
        ("pgvector/pgvector:pg17", "postgres"), ("ghcr.io/cloudnative-pg/postgresql:16", "postgres"),
        ("bitnami/postgresql@sha256:abc", "postgres"), ("redis:7", "redis"), ("valkey/valkey:8", "redis"),
        ("redis/redis-stack-server", "redis"), ("chromadb/chroma:1.5.9", "chroma"),
        ("ghcr.io/chroma-core/chroma:latest", "chroma"), ("nginx", None), ("prom/prometheus", None),
        ("oliver006/redis_exporter", None), ("redis.example.com:5000/nginx", None),
        ("postgres.example.com/shop/web", None), ("prometheuscommunity/postgres-exporter", None),
        ("redis-commander/redis-commander", None), ("dpage/pgadmin4", None),
    ],
)  # fmt: skip
def test_the_image_suggests_the_driver(image: str, driver: str | None) -> None:
    """Servers, under their usual names; not exporters, not consoles, not a registry's host."""
    assert driver_of(container("c", image)) == driver


def test_a_compose_project_becomes_sources_and_a_stack() -> None:
    """Databases by their service's names, each other volume once; what a database keeps is not read twice."""

    def labels(service: str) -> dict[str, str]:
        return {"com.docker.compose.project": "shop", "com.docker.compose.service": service}

    found = discover(
        [
            container("shop-web-1", "shop/web", labels=labels("web"), mounts=(volume("shop_uploads"),)),
            container("shop-web-2", "shop/web", labels=labels("web"), mounts=(volume("shop_uploads"),)),
            container("shop-db-1", "postgres:16", labels=labels("db"), env={"POSTGRES_USER": "shop"},
                      mounts=(volume("shop_pgdata"),)),
            container("shop-cache-1", "redis:7", labels={**labels("cache"), "backupd.schedule": "@hourly"},
                      mounts=(volume("ab" * 32),)),
        ]
    )  # fmt: skip
    assert [(f.name, f.driver, dict(f.settings), f.stack) for f in found] == [
        ("cache", "redis", {"container": "shop-cache-1", "schedule": "@hourly"}, "shop"),
        ("db", "postgres", {"container": "shop-db-1", "user": "shop"}, "shop"),
        ("shop_uploads", "volume", {"volume": "shop_uploads"}, "shop"),
    ]


def test_labels_decide_where_they_are_given() -> None:
    """Left out, renamed, of another driver; and never our own."""
    found = discover(
        [
            container("a", "postgres:16", labels={"backupd.enable": "false"}),
            container("b", "acme/db", labels={"backupd.driver": "postgres", "backupd.name": "orders"}),
            container("c", "redis:7", labels={"backupd.sandbox": "restore-1"}),
            container("d", "example/backupd:1", mounts=(volume("backups"),)),
            container("e", "redis:7", status="exited"),
            container("f", "nginx", mounts=(volume("ro", writable=False),)),
        ]
    )
    assert [(f.name, f.driver) for f in found] == [("orders", "postgres")]


def test_names_that_collide_are_told_apart() -> None:
    """Two projects with a `db` each."""
    labels = {"com.docker.compose.service": "db"}
    found = discover([container(n, "redis:7", labels=labels) for n in ("x-db-1", "y-db-1", "z-db-1")])
    assert [f.name for f in found] == ["db", "db-2", "db-3"]


names = st.text(min_size=1, max_size=20)


@given(
    st.lists(
        st.builds(
            ContainerInfo,
            names,
            st.sampled_from(["postgres:16", "redis:7", "chromadb/chroma", "nginx"]),
            st.just("running"),
            st.dictionaries(
                st.sampled_from(["backupd.name", "com.docker.compose.project", "com.docker.compose.service"]),
                names,
            ),
            st.dictionaries(st.just("POSTGRES_USER"), names),
            st.lists(st.builds(volume, names), max_size=2).map(tuple),
        ),
        max_size=6,
        unique_by=lambda c: c.name,
    ),
    names,
)
def test_every_starter_configuration_loads(containers: list[ContainerInfo], location: str) -> None:
    """Whatever containers are called, and whatever stands in their labels."""
    found = discover(containers)
    config = parse(starter(found, "./" + location), origin="starter", base=Path("/"), env={})
    assert set(config.sources) == {f.name for f in found}


def test_a_starter_configuration_without_sources_shows_how_to_write_one() -> None:
    """And protects what it keeps by a retention."""
    text = starter([], "./backups")
    assert "# [sources.orders]" in text
    assert parse(text, origin="starter", base=Path("/"), env={}).defaults.retention.monthly == 12


def test_a_starter_configuration_holds_no_secret() -> None:
    """A container's password is its own."""
    env = {"POSTGRES_USER": "shop", "POSTGRES_PASSWORD": "hunter2", "REDIS_PASSWORD": "hunter2"}
    text = starter(discover([container("db", "postgres:16", env=env)]), "x")
    assert "hunter2" not in text


def test_found_says_why() -> None:
    """The comment beside a source names what it was found by."""
    assert "# postgres:16" in starter([Found("db", "postgres", {"container": "db"}, "postgres:16")], "x")


def test_init_finds_what_runs_and_what_it_writes_works(tmp_path: Path, start_redis: StartService) -> None:
    """From a container to a recovery point in two commands, on a real engine; nothing is overwritten."""
    server = start_redis(extra_labels={"backupd.name": "sessions-of-the-test"})
    server.exec("redis-cli", "set", "greeting", "hello")
    home = Home(tmp_path)
    made = home.ok("init", "--json").json
    assert made["wrote"] and made["made"]
    assert "sessions-of-the-test" in made["sources"]
    assert f'container = "{server.name}"' in (tmp_path / "backupd.toml").read_text()
    home.ok("backup", "sessions-of-the-test")
    assert len(home.ok("list", "--json").json) == 1
    text = (tmp_path / "backupd.toml").read_text()
    again = home.ok("init", "--json").json
    assert not again["wrote"] and not again["made"]
    assert (tmp_path / "backupd.toml").read_text() == text
