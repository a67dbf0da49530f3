"""The test bed itself: each real part starts, answers, and is gone afterwards."""

from __future__ import annotations

import docker
import pytest
import services as bed


def test_postgres_is_ready_when_handed_out_and_gone_afterwards(docker_client: docker.DockerClient) -> None:
    """A test may query at once, and finds nothing of an earlier test."""
    made = bed.Services(docker_client)
    server = made.postgres(user="us-er", password='p"a ss', db="my db")
    assert bed.postgres_version(server).startswith("16.")
    volumes = [mount["Name"] for mount in server.container.attrs["Mounts"]]
    made.close()
    with pytest.raises(docker.errors.NotFound):
        docker_client.containers.get(server.name)
    for volume in volumes:
        with pytest.raises(docker.errors.NotFound):
            docker_client.volumes.get(volume)


def test_redis_and_chroma_are_ready_when_handed_out(services: bed.Services) -> None:
    """Both answer, with a password and in a network of their own."""
    network = services.network()
    redis = services.redis("--save", "", password="s3", network=network)
    chroma = services.chroma(network=network, aliases=["vectors"], volume=services.volume())
    ping = redis.exec("redis-cli", "--no-auth-warning", "-a", "s3", "ping")
    assert ping.strip() == "PONG"
    assert bed.http_get(chroma, "/api/v2/version") is not None
    assert services.client.containers.get(chroma.name).attrs["NetworkSettings"]["Networks"].keys() == {
        network
    }


def test_s3_server_refuses_strangers_and_keeps_conditions(s3_server: bed.S3Server) -> None:
    """Wrong secrets are refused, and a second create of the same key fails: both matter to leases."""
    from botocore.exceptions import ClientError

    bucket = s3_server.new_bucket()
    client = s3_server.client()
    client.put_object(Bucket=bucket, Key="k", Body=b"one", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="k", Body=b"two", IfNoneMatch="*")
    stranger = bed.S3Server(s3_server.endpoint, s3_server.access_key, "wrong").client()
    with pytest.raises(ClientError):
        stranger.list_objects_v2(Bucket=bucket)
    for _ in range(12):  # each bucket takes volumes; the default settings run out after ten
        client.put_object(Bucket=s3_server.new_bucket(), Key="k", Body=b"x")
