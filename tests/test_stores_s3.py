"""The store in a bucket: what it says when something is wrong, and servers that cannot do everything."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.auth
import pytest
import services as bed
from botocore.exceptions import ClientError
from fault_proxy import FaultProxy

from backupd.errors import ObjectExists, ObjectMissing, StoreError, UsageError
from backupd.stores import LocalStore, open_store, s3
from backupd.stores.s3 import S3Options, S3Store
from backupd.stores.s3_errors import Place, explain


@pytest.fixture(scope="module")
def bucket(s3_server: bed.S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture
def options(s3_server: bed.S3Server) -> S3Options:
    """How the test server is reached, with little patience."""
    return S3Options(
        endpoint_url=s3_server.endpoint,
        access_key_id=s3_server.access_key,
        secret_access_key=s3_server.secret_key,
        attempts=1,
    )


@pytest.fixture
def store(bucket: str, options: S3Options) -> S3Store:
    return S3Store(bucket, os.urandom(6).hex(), options)


def every_call(store: S3Store) -> list[StoreError]:
    """What each method raises."""
    said = []
    for call in (
        lambda: store.put("a", b"1"),
        lambda: store.get("a"),
        lambda: store.stat("a"),
        lambda: list(store.list()),
        lambda: store.delete("a"),
        lambda: store.lease("leases/a").__enter__(),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        assert caught.value.hint
        said.append(caught.value)
    return said


# --- what can be wrong ---------------------------------------------------------------------------------------


def test_a_missing_bucket_is_told_by_every_call_and_never_made(
    s3_server: bed.S3Server, options: S3Options
) -> None:
    """Not "no such object", not a bucket that appears by itself."""
    store = S3Store("no-such-bucket", "prefix", options)
    for error in every_call(store):
        assert "there is no bucket no-such-bucket" in str(error)
        assert not isinstance(error, ObjectMissing) and not error.transient
    assert "no-such-bucket" not in [each["Name"] for each in s3_server.client().list_buckets()["Buckets"]]


def test_a_wrong_secret_is_told_by_every_call(bucket: str, options: S3Options) -> None:
    """HEAD requests get no reason from the server; the message has one all the same."""
    for error in every_call(S3Store(bucket, "", replace(options, secret_access_key="wrong-secret-1"))):
        assert "refused the secret key" in str(error) and "secret_access_key" in error.hint
        assert "wrong-secret-1" not in str(error) + error.hint
        assert not error.transient


def test_an_unknown_key_is_told_by_every_call(bucket: str, options: S3Options) -> None:
    """The hint names the setting."""
    for error in every_call(S3Store(bucket, "", replace(options, access_key_id="NOSUCHKEY"))):
        assert "does not know the access key" in str(error) and "access_key_id" in error.hint


def test_a_server_that_cannot_be_reached_is_told_by_every_call(bucket: str, options: S3Options) -> None:
    """Trying again may help, so it is transient."""
    for error in every_call(S3Store(bucket, "", replace(options, endpoint_url="http://127.0.0.1:9"))):
        assert "http://127.0.0.1:9 cannot be reached" in str(error) and "endpoint_url" in error.hint
        assert error.transient


def test_a_clock_that_is_wrong_is_told(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour off: the server refuses, and the hint is about this machine's clock."""
    import datetime

    now = botocore.auth.get_current_datetime  # type: ignore[attr-defined]
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda *a, **k: now(*a, **k) + datetime.timedelta(hours=1)
    )
    with pytest.raises(StoreError, match="clocks") as caught:
        store.get("a")
    assert "NTP" in caught.value.hint and not caught.value.transient


def test_no_credentials_are_told(bucket: str, options: S3Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither options nor the usual chain have any."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    store = S3Store(bucket, "", replace(options, access_key_id="", secret_access_key=""))
    with pytest.raises(StoreError, match="no credentials") as caught:
        store.get("a")
    assert "secret_access_key" in caught.value.hint


def test_the_usual_chain_is_used(
    bucket: str, s3_server: bed.S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key and secret from the environment, as every AWS tool takes them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    store = S3Store(bucket, "chain", S3Options(endpoint_url=s3_server.endpoint))
    store.put("a", b"1")
    assert store.get("a") == b"1"


@pytest.mark.parametrize(
    ("code", "status", "happened", "transient"),
    [
        ("AccessDenied", 403, "access to bucket box was denied", False),
        ("403", 403, "access to bucket box was denied", False),
        ("SomethingNew", 403, "access to bucket box was denied", False),
        ("RequestTimeTooSkewed", 403, "clocks", False),
        ("ExpiredToken", 400, "session token has expired", False),
        ("PermanentRedirect", 301, "not in region moon-1", False),
        ("301", 301, "not in region moon-1", False),
        ("QuotaExceeded", 403, "quota", False),
        ("507", 507, "is full", False),
        ("NotImplemented", 501, "does not know this kind of request", False),
        ("SlowDown", 503, "answered 503 SlowDown", True),
        ("TooManyRequests", 429, "answered 429", True),
        ("InternalError", 500, "answered 500", True),
        ("502", 502, "answered 502", True),
        ("BadDigest", 400, "answered 400 BadDigest", True),
        ("ConditionalRequestConflict", 409, "answered 409", True),
        ("Weird", 418, "answered 418 Weird I am a teapot", False),
    ],
)
def test_every_answer_of_a_server_becomes_one_line(
    code: str, status: int, happened: str, transient: bool
) -> None:
    """Known codes with a hint, numbers where HEAD gives no code, unknown ones as they are."""
    answer: Any = {
        "Error": {"Code": code, "Message": "I am\na teapot"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error = explain(
        ClientError(answer, "PutObject"), "cannot write s3://box/a", Place("box", "http://s3", "moon-1")
    )
    assert str(error).startswith("cannot write s3://box/a: ") and happened in str(error)
    assert "\n" not in str(error)
    assert error.transient is transient
    assert error.hint or code == "Weird"


@pytest.fixture
def web_server() -> Iterator[type[BaseHTTPRequestHandler]]:
    """Something that speaks HTTP and is no S3: set `status` and `body` on it; `url` is where it is."""

    class Handler(BaseHTTPRequestHandler):
        status, body, url = 200, b"", ""

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(self.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(self.body)

        do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Handler.url = f"http://127.0.0.1:{server.server_port}"
        yield Handler
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>please log in</html>"), (200, b""), (200, b"<html><p>"), (404, b"not found"), (302, b"x")],
)
def test_a_server_that_is_no_s3_stores_nothing_and_is_told(
    status: int, body: bytes, web_server: Any, options: S3Options
) -> None:
    """A login page that says 200 to every PUT is not a backup; each call says so in one line."""
    web_server.status, web_server.body = status, body
    store = S3Store("box", "", replace(options, endpoint_url=web_server.url))
    if status != 404:
        for error in every_call(store):
            assert web_server.url in str(error) and not isinstance(error, ObjectMissing)
    else:
        with pytest.raises(StoreError, match="does not answer as S3 does"):
            list(store.list())
        with pytest.raises(StoreError, match="no bucket"):
            store.put("a", b"1")


# --- TLS -----------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """A certificate for 127.0.0.1 that nobody trusts, and its key."""
    files = (str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem"))
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=backupd test",
            "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1],
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return files


def test_a_private_certificate_authority_works_when_named(
    s3_server: bed.S3Server, bucket: str, options: S3Options, certificate: tuple[str, str]
) -> None:
    """Over https with `ca_bundle` all works, whichever checksum; without it the hint names the setting."""
    with FaultProxy(s3_server.endpoint, tls=certificate) as proxy:
        secure = replace(options, endpoint_url=proxy.endpoint, ca_bundle=certificate[0])
        for checksum in ("when_supported", "when_required"):
            store = S3Store(bucket, f"tls-{checksum}", replace(secure, request_checksum=checksum))
            store.put("a/b", b"x" * 100_000)
            assert store.get("a/b") == b"x" * 100_000
            assert [info.key for info in store.list()] == ["a/b"]
        for error in every_call(S3Store(bucket, "", replace(secure, ca_bundle=""))):
            assert "certificate" in str(error) and "ca_bundle" in error.hint
            assert not error.transient


# --- secrets ---------------------------------------------------------------------------------------------------


def test_no_secret_is_ever_shown(bucket: str) -> None:
    """Not in the options' repr, the location, or any message."""
    options = S3Options(
        endpoint_url="http://127.0.0.1:9",
        access_key_id="AKIA",
        secret_access_key="hush",
        session_token="quiet",
    )
    store = S3Store(bucket, "a", replace(options, attempts=1))
    shown = repr(options) + repr(store) + store.location
    for error in every_call(store):
        shown += str(error) + error.hint + repr(error)
    assert "hush" not in shown and "quiet" not in shown


@pytest.mark.parametrize(
    "location",
    ["s3://key:hush@bucket/prefix", "s3://bucket/prefix?secret=hush", "s3:///prefix", "s3://b/../c"],
)
def test_a_location_is_a_bucket_and_a_prefix_and_nothing_else(location: str) -> None:
    """Refused without saying the secret."""
    with pytest.raises((UsageError, StoreError)) as caught:
        open_store(location)
    assert "hush" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint_url": "http://key:hush@server"},
        {"endpoint_url": "server:9000"},
        {"endpoint_url": "ftp://server"},
        {"request_checksum": "sometimes"},
        {"ca_bundle": "/no/such/file"},
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, str]) -> None:
    """Before anything is sent, with a hint, without the secret."""
    with pytest.raises(UsageError) as caught:
        S3Options(**wrong)  # type: ignore[arg-type]
    assert "hush" not in str(caught.value) and caught.value.hint


# --- what is kept in the bucket ---------------------------------------------------------------------------------


def test_prefixes_do_not_see_each_other(bucket: str, options: S3Options) -> None:
    """`a` and `ab` and the whole bucket's root are different places."""
    one, other = S3Store(bucket, "p/a", options), S3Store(bucket, "/p/ab/", options)
    one.put("x/1", b"1")
    other.put("x/2", b"2")
    assert [info.key for info in one.list()] == ["x/1"]
    assert [info.key for info in other.list()] == ["x/2"]
    assert (one.location, other.location) == (f"s3://{bucket}/p/a", f"s3://{bucket}/p/ab")


def test_a_bucket_without_prefix_works(s3_server: bed.S3Server, options: S3Options) -> None:
    """Keys are the objects' own names, and the probe is not shown."""
    bucket = s3_server.new_bucket()
    store = S3Store(bucket, "", options)
    store.put("backupd-repository.json", b"{}")
    assert [info.key for info in store.list()] == ["backupd-repository.json"]
    stored = [entry["Key"] for entry in s3_server.client().list_objects_v2(Bucket=bucket)["Contents"]]
    assert stored == ["+probe", "backupd-repository.json"]


def test_probing_for_leases_leaves_nothing(s3_server: bed.S3Server, bucket: str, options: S3Options) -> None:
    """Only the lease's own record stays."""
    store = S3Store(bucket, "probing", options)
    with store.lease("leases/prune.json"):
        pass
    listed = s3_server.client().list_objects_v2(Bucket=bucket, Prefix="probing/")["Contents"]
    assert [entry["Key"] for entry in listed] == ["probing/leases/prune.json"]


def test_what_one_put_cannot_carry_is_refused(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a byte is sent."""
    monkeypatch.setattr(s3, "LARGEST", 10)
    with pytest.raises(StoreError, match="more than one PUT can carry"):
        store.put("a", b"x" * 11)


def test_objects_are_the_same_on_both_kinds_of_store(
    s3_server: bed.S3Server, bucket: str, options: S3Options, tmp_path: Path
) -> None:
    """A repository copied from a bucket to a directory, with whatever tool, has the same keys and bytes."""
    store = S3Store(bucket, "copied", options)
    for key in ("backupd-repository.json", "packs/a/1/0000.zst", "points/a/1.json.zst"):
        store.put(key, key.encode())
    client = s3_server.client()
    for entry in client.list_objects_v2(Bucket=bucket, Prefix="copied/")["Contents"]:
        path = tmp_path / entry["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, entry["Key"], str(path))
    copied = LocalStore(tmp_path / "copied")
    assert [info.key for info in copied.list()] == [info.key for info in store.list()]
    assert all(copied.get(info.key) == info.key.encode() for info in copied.list())


# --- a server that keeps no conditions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lax_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Options]:
    """rclone's S3 server: it says 200 to every condition and overwrites. A session without it fails."""
    beside = Path(sys.executable).with_name("rclone")
    program = str(beside) if beside.exists() else shutil.which("rclone")
    if program is None:
        pytest.fail("rclone is not installed; hint: pip install -e '.[dev]'")
    root = tmp_path_factory.mktemp("rclone")
    (root / "box").mkdir()
    [port] = bed.free_ports(1)
    process = subprocess.Popen(
        [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", "key,secret", str(root)],
        env={"PATH": os.environ.get("PATH", ""), "HOME": str(root), "RCLONE_CONFIG": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=bed.die_with_parent,  # noqa: PLW1509  one prctl; no lock is taken
    )
    options = S3Options(
        endpoint_url=f"http://127.0.0.1:{port}", access_key_id="key", secret_access_key="secret", attempts=1
    )

    def answers() -> bool:
        assert process.poll() is None, "rclone ended"
        with contextlib.suppress(StoreError):
            return list(S3Store("box", "", options).list()) == []
        return False

    bed.wait_until(answers, timeout=20, what="rclone serve s3")
    bed.exercised["S3 server without conditions"] = "rclone"
    yield options
    process.terminate()
    process.wait()


def test_where_conditions_are_not_kept_a_lease_is_refused(lax_server: S3Options) -> None:
    """It would exclude nobody: an error that says why and what to use instead, and no lease object."""
    store = S3Store("box", "refused", lax_server)
    with pytest.raises(StoreError, match="does not keep conditions") as caught:
        store.lease("leases/prune.json").__enter__()
    assert "prune" in caught.value.hint and not caught.value.transient
    assert list(store.list()) == []


def test_where_conditions_are_not_kept_put_looks_first(lax_server: S3Options) -> None:
    """Still no object is replaced in silence; and ranges, lists and deletes work there too."""
    store = S3Store("box", "lax", lax_server)
    store.put("a/b", b"first")
    with pytest.raises(ObjectExists):
        store.put("a/b", b"second")
    assert store.get("a/b") == b"first"
    assert store.get("a/b", offset=1, length=3) == b"irs"
    assert [info.key for info in store.list()] == ["a/b"]
    store.put("a/b", b"third", overwrite=True)
    assert store.get("a/b") == b"third"
    store.delete("a/b")
    with pytest.raises(ObjectMissing):
        store.get("a/b")


# --- opening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["", "sftp://host/path", "gs://bucket", "S3://bucket"])
def test_a_location_of_no_known_kind_is_refused(location: str) -> None:
    """The hint names what there is."""
    with pytest.raises(UsageError) as caught:
        open_store(location)
    assert "s3://" in caught.value.hint


def test_a_directory_may_be_named_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative, below the home directory, as a file URL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store(f"{tmp_path}/a b", create=True).put("k", b"1")
    for location in ("a b", "./a b", "~/a b", f"file://{tmp_path}/a%20b"):
        store = open_store(location)
        assert store.get("k") == b"1"
        assert store.location == f"{tmp_path}/a b"


def test_opening_loads_no_s3_library() -> None:
    """boto3 takes a fifth of a second to import: only the first request does."""
    code = (
        "import sys; from backupd.stores import open_store; open_store('s3://bucket'); open_store('/');"
        "print([name for name in sys.modules if name.startswith(('boto', 'urllib3'))])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
