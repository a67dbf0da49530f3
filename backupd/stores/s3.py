"""A store in a bucket: an object is an object under its key, below a prefix.

Every object is one PUT, which S3 takes whole or not at all. Servers differ in what else they keep, so the
first write asks, with a small object of the store's own (`+probe`, which `list` never shows): is a condition
on a write kept, is a checksum compared?
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import secrets
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from backupd.errors import ObjectExists, ObjectMissing, StoreError, UsageError
from backupd.model import Bytes, Lease, ObjectInfo
from backupd.stores.leases import HeartbeatLease, Reading, holding
from backupd.stores.names import OWN, check_key, check_prefix, check_range, is_key
from backupd.stores.s3_errors import Place, code_of, explain, not_s3, status_of

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3.client import S3Client

LARGEST = 5 << 30  # S3's limit for a single PUT
_REFUSED = (409, 412)
_RACERS = 8
_PUT_ID = "backupd-put"


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to reach the server. What is empty comes from the usual AWS chain (environment, files, role)."""

    endpoint_url: str = ""
    region: str = ""
    access_key_id: str = ""
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    path_style: bool | None = None
    """None: path style for an endpoint of one's own, the host style for AWS."""
    ca_bundle: str = ""
    request_checksum: str = "when_supported"
    """`when_supported`: CRC32 where the server compares it, else Content-MD5. `when_required`: only that."""
    connections: int = 16
    """How many requests may be under way at once."""
    attempts: int = 8
    """How often botocore sends one request, pauses included about 35 s; RetryStore begins after that."""
    connect_timeout: float = 5.0
    read_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.request_checksum not in ("when_supported", "when_required"):
            raise UsageError(
                f"request_checksum cannot be {self.request_checksum!r}",
                hint="when_supported or when_required",
            )
        if self.endpoint_url:
            address = urlsplit(self.endpoint_url)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise UsageError("endpoint_url is no http or https address", hint="https://s3.example.com")
            if address.username is not None or address.password is not None:
                raise UsageError(
                    "endpoint_url holds a password", hint="use access_key_id and secret_access_key instead"
                )
        if self.ca_bundle and not Path(self.ca_bundle).is_file():
            raise UsageError(f"there is no file {self.ca_bundle}", hint="correct repository.ca_bundle")


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the server was seen to do."""

    create_only: bool
    """A PUT with If-None-Match is refused where there is an object."""
    crc32: bool
    """The checksum of a PUT is compared."""


class S3Store:
    """Objects in `bucket`, below `prefix` ("" or "a/b"). Safe for use by several threads.

    Where the server does not keep If-None-Match, `put` looks first: two puts of one key in the same instant
    can then both succeed. Leases are refused there.
    """

    def __init__(self, bucket: str, prefix: str = "", options: S3Options | None = None) -> None:
        self._options = options or S3Options()
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._lock = threading.RLock()
        self._made: S3Client | None = None
        self._abilities: Abilities | None = None
        self._conditions_kept = False
        self._bucket_seen = False

    @property
    def location(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put(self, key: str, data: Bytes, *, overwrite: bool = False) -> None:
        check_key(key)
        if len(data) > LARGEST:
            raise StoreError(
                f"cannot write {self._name(key)}: {len(data)} bytes are more than one PUT can carry"
            )
        abilities = self._able()
        conditions: dict[str, Any] = {}
        put_id = secrets.token_hex(16)
        if not overwrite:
            if abilities.create_only:
                conditions = {"IfNoneMatch": "*", "Metadata": {_PUT_ID: put_id}}
            elif self._exists(key):
                raise self._already_there(key)
        with self._explained(f"cannot write {self._name(key)}") as client:
            try:
                # Asking for the ETag: any web server may say 200, and store nothing.
                client.put_object(
                    **self._at(key), Body=_body(data), **_digest(data, abilities.crc32), **conditions
                )["ETag"]
            except Exception as error:
                if status_of(error) != 412 or not conditions:
                    raise
                if not self._sent_twice(error, key, put_id):
                    raise self._already_there(key) from None

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """A bit flipped on the way here is not noticed: whoever asks compares the archive's digests."""
        check_key(key)
        check_range(offset, length)
        if length == 0:
            self.stat(key)
            return b""
        wanted: dict[str, Any] = {}
        if offset or length is not None:
            wanted["Range"] = f"bytes={offset}-{'' if length is None else offset + length - 1}"
        with self._explained(f"cannot read {self._name(key)}") as client:
            try:
                answer = client.get_object(**self._at(key), **wanted)
            except Exception as error:
                if wanted and (status_of(error) == 416 or code_of(error) == "InvalidRange"):
                    return b""
                raise
            answer["ETag"]
            data: bytes = answer["Body"].read()
            if len(data) != answer["ContentLength"]:
                raise StoreError(f"cannot read {self._name(key)}: the answer was cut short", transient=True)
        if wanted and "ContentRange" not in answer:  # a server that gives the whole object whatever was asked
            return data[offset:] if length is None else data[offset : offset + length]
        return data

    def stat(self, key: str) -> ObjectInfo:
        check_key(key)
        with self._explained(f"cannot read {self._name(key)}") as client:
            try:
                head = client.head_object(**self._at(key))
            except Exception as error:
                if status_of(error) == 404:
                    self._check_bucket(client)
                if status_of(error) == 403:  # HEAD does not say why; this fails too, and does
                    client.get_object(**self._at(key), Range="bytes=0-0")
                raise
            return ObjectInfo(key, head["ContentLength"], head["LastModified"].astimezone(UTC))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Listed to its end before the first is handed out, and sorted here: SeaweedFS for one puts `a/b`
        before `a-b`. About 250 bytes of memory an object."""
        check_prefix(prefix)
        found: list[ObjectInfo] = []
        more: dict[str, Any] = {}
        with self._explained(f"cannot list {self.location}/{prefix}") as client:
            while True:
                try:
                    page = client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + prefix, **more)
                except Exception as error:
                    if code_of(error) == "404":
                        raise KeyError("NoSuchBucket") from error  # some other server's 404
                    raise
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    if is_key(key):
                        found.append(ObjectInfo(key, entry["Size"], entry["LastModified"].astimezone(UTC)))
                if not page["IsTruncated"]:
                    break
                token = page.get("NextContinuationToken")
                if not token or token == more.get("ContinuationToken"):
                    raise StoreError(
                        f"cannot list {self.location}: the server says that there is more, not where",
                        hint="the server does not speak ListObjectsV2 as it should",
                    )
                more = {"ContinuationToken": token}
        found.sort(key=lambda info: info.key)
        return iter(found)

    def delete(self, key: str) -> None:
        """Two requests: S3 itself does not say that there was nothing."""
        self.stat(key)
        with self._explained(f"cannot remove {self._name(key)}") as client:
            client.delete_object(**self._at(key))

    @contextmanager
    def lease(self, key: str, *, ttl: float = 60.0) -> Iterator[Lease]:
        """Renewed every `ttl / 3` seconds by conditional writes; who is silent for 1.5 * ttl is replaced."""
        check_key(key)
        self._check_conditions()
        patience = max(1.0, ttl / 6)  # a renewal that hangs must leave time for the next
        client = self._connect(attempts=4, connect_timeout=min(5.0, patience), read_timeout=patience)
        register = _Register(self, client, key)
        with holding(HeartbeatLease(register, key, ttl=ttl)) as lease:
            yield lease

    # --- within ------------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return f"{self.location}/{key}"

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _already_there(self, key: str) -> ObjectExists:
        return ObjectExists(f"{self._name(key)} is already there")

    @property
    def _client(self) -> S3Client:
        with self._lock:
            if self._made is None:
                self._made = self._connect(
                    attempts=self._options.attempts,
                    connect_timeout=self._options.connect_timeout,
                    read_timeout=self._options.read_timeout,
                )
            return self._made

    def _connect(self, *, attempts: int, connect_timeout: float, read_timeout: float) -> S3Client:
        from botocore.config import Config

        options = self._options
        path_style = bool(options.endpoint_url) if options.path_style is None else options.path_style
        with _making:
            session = _session(
                options.access_key_id, options.secret_access_key, options.session_token, options.region
            )
            return session.client(
                "s3",
                endpoint_url=options.endpoint_url or None,
                region_name=session.region_name or "us-east-1",
                verify=options.ca_bundle or None,
                config=Config(
                    connect_timeout=connect_timeout,
                    read_timeout=read_timeout,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    max_pool_connections=options.connections,
                    s3={"addressing_style": "path" if path_style else "auto"},
                    # Ours are sent as headers; botocore's own would go as trailers, which older servers refuse.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    @contextmanager
    def _explained(self, what: str) -> Iterator[S3Client]:
        """The client; its errors come out as StoreErrors."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        place = Place(self._bucket, self._options.endpoint_url, self._options.region or "us-east-1")
        try:
            yield self._client
        except (BotoCoreError, ClientError, HTTPError, OSError, ValueError, ResponseParserError) as error:
            raise explain(error, what, place) from error
        except (KeyError, RecursionError) as error:  # what S3 always says was not said; redirected in circles
            raise not_s3(what, place) from error
        self._bucket_seen = True

    def _check_bucket(self, client: S3Client) -> None:
        """HEAD of an object says 404 for a missing bucket too. Raises what HEAD of the bucket says."""
        if self._bucket_seen:
            return
        try:
            client.head_bucket(Bucket=self._bucket)
        except Exception as error:
            if status_of(error) == 404:
                error.response["Error"]["Code"] = "NoSuchBucket"  # type: ignore[attr-defined]
                raise
        self._bucket_seen = True

    def _exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except ObjectMissing:
            return False
        return True

    def _sent_twice(self, error: Exception, key: str, put_id: str) -> bool:
        """True when the object in the way is of this very put: its answer was lost, and it was sent again."""
        response: dict[str, Any] = getattr(error, "response", {})
        if not response.get("ResponseMetadata", {}).get("RetryAttempts"):
            return False
        with self._explained(f"cannot read {self._name(key)}") as client:
            return client.head_object(**self._at(key))["Metadata"].get(_PUT_ID) == put_id

    # --- what the server can do ---------------------------------------------------------------------------

    def _able(self) -> Abilities:
        """Asked once, by two small writes."""
        with self._lock:
            if self._abilities is None:
                probe = {**self._at(f"{OWN}probe"), "Body": b"backupd"}
                modern = self._options.request_checksum == "when_supported"
                with self._explained(f"cannot write to {self.location}") as client:
                    self._check_bucket(client)  # some servers make the bucket of whatever is put
                    crc32 = False
                    if modern:
                        answer = client.put_object(**probe, **_digest(b"backupd", crc32=True))
                        answer["ETag"]
                        crc32 = answer.get("ChecksumCRC32") == _crc32(b"backupd")
                    else:
                        client.put_object(**probe, **_digest(b"backupd", crc32=False))["ETag"]
                    kept = _refused(client, **probe, IfNoneMatch="*")
                self._abilities = Abilities(create_only=kept, crc32=crc32)
            return self._abilities

    def _check_conditions(self) -> None:
        """Raises StoreError where a lease would exclude nobody."""
        if self._conditions_kept:
            return
        name = f"{OWN}probe-{secrets.token_hex(8)}"
        one, many = self._at(name), self._at(f"{name}-race")
        modern = self._options.request_checksum == "when_supported"
        with (
            self._explained(f"cannot take a lease in {self.location}") as client,
            ThreadPoolExecutor(_RACERS) as racers,
        ):
            self._check_bucket(client)
            try:
                # Twice: an answer that was lost on the way looks like a refusal.
                found = _keeps_conditions(client, racers, one, many, crc32=modern) or _keeps_conditions(
                    client, racers, one, many, crc32=modern
                )
            finally:
                removed = racers.map(lambda each: _remove(client, each), (one, many))
        list(removed)
        if found is None:
            raise StoreError(
                f"cannot take a lease in {self.location}: the server does not keep conditions on writes",
                hint="what deletes (prune) is refused there, as two agents could do it at once; "
                "use a server with If-None-Match and If-Match on PUT (AWS S3, MinIO, SeaweedFS from 4.48)",
            )
        self._abilities = self._abilities or found
        self._conditions_kept = True


_making = threading.RLock()  # a session makes one client at a time


@functools.cache
def _session(access_key_id: str, secret_access_key: str, session_token: str, region: str) -> Session:
    """Kept: its second client takes a tenth of the time, S3's description being read."""
    import boto3

    return boto3.session.Session(
        aws_access_key_id=access_key_id or None,
        aws_secret_access_key=secret_access_key or None,
        aws_session_token=session_token or None,
        region_name=region or None,
    )


class _Register:
    """A lease's object."""

    def __init__(self, store: S3Store, client: S3Client, key: str) -> None:
        self._store, self._client, self._key = store, client, key

    def read(self) -> Reading | None:
        try:
            with self._store._explained(f"cannot read the lease {self._key}"):
                answer = self._client.get_object(**self._store._at(self._key))
                data = answer["Body"].read()
        except ObjectMissing:
            return None
        age = None
        with contextlib.suppress(KeyError, ValueError, TypeError):
            said = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            age = (said - answer["LastModified"]).total_seconds()
        return Reading(data, answer["ETag"], age)

    def write(self, data: bytes, expected: str | None) -> str | None:
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        with self._store._explained(f"cannot write the lease {self._key}"):
            try:
                return self._client.put_object(
                    **self._store._at(self._key), Body=data, **_digest(data, crc32=False), **condition
                )["ETag"]
            except Exception as error:
                if status_of(error) in (*_REFUSED, 404):
                    return None
                raise


def _refused(client: S3Client, **put: Any) -> bool:
    """True when the condition of a PUT held it back."""
    digest = _digest(put["Body"], crc32=False)  # buckets with object lock insist on one
    try:
        client.put_object(**put, **digest)
    except Exception as error:
        if status_of(error) in _REFUSED:
            return True
        if status_of(error) == 501 or code_of(error) == "NotImplemented":
            return False
        raise
    return False


def _keeps_conditions(
    client: S3Client, racers: ThreadPoolExecutor, one: dict[str, Any], many: dict[str, Any], *, crc32: bool
) -> Abilities | None:
    """What a server does whose PUT keeps its condition, and of eight at once one wins; None for another. Some look,
    then write. The race is run beside the rest: each answer may be long on its way. It decides only where the rest
    is well: servers that look at no condition fail in many ways when eight write one object at once."""
    racing = [racers.submit(_refused, client, **many, Body=b"1", IfNoneMatch="*") for _ in range(_RACERS)]
    try:
        first = client.put_object(**one, Body=b"1", **_digest(b"1", crc32))
        tag = first["ETag"]  # a web server that is no S3 gives none
        kept = (
            _refused(client, **one, Body=b"2", IfNoneMatch="*")
            and _refused(client, **one, Body=b"2", IfMatch='"00000000000000000000000000000000"')
            and not _refused(client, **one, Body=b"3", IfMatch=tag)
        )
    finally:
        wait(racing)  # what they write is removed next
    if not kept or sum(race.result() for race in racing) < _RACERS - 1:
        return None
    compared = crc32 and first.get("ChecksumCRC32") == _crc32(b"1")
    return Abilities(create_only=True, crc32=compared)


def _remove(client: S3Client, at: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        client.delete_object(**at)


def _body(data: Bytes) -> Any:
    """As botocore takes it, without a copy: packs on their way are most of the memory that a backup needs."""
    return data if isinstance(data, bytes) else io.BufferedReader(_View(data), 1 << 16)


class _View(io.RawIOBase):
    """A view, read as a file."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def _digest(data: Bytes, crc32: bool) -> dict[str, Any]:
    """The argument of a PUT with which the server refuses bytes that changed on their way.

    CRC32 takes a fifth of the time of MD5 (2.5 against 0.5 GB/s), but only MD5 is compared by older servers.
    """
    if crc32:
        return {"ChecksumCRC32": _crc32(data)}
    return {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}


def _crc32(data: Bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
