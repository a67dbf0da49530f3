"""Fixtures that start real services (tests/services.py does the work).

Function scope: `services`, `start_postgres`, `start_redis`, `start_chroma`, `start_container`.
For a whole module: `module_services`, with `.postgres()`, `.redis()` and so on.
For the whole session, to read from or to use under names of your own: `session_postgres`, `s3_server`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import services as bed

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


@pytest.fixture(scope="session")
def session_postgres(session_services: bed.Services) -> bed.Service:
    """One PostgreSQL server for the session: make databases of your own in it."""
    return session_services.postgres()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[bed.S3Server]:
    """One S3 server for the session: take a `new_bucket()` each."""
    with bed.s3_server() as server:
        yield server
