"""What a running ChromaDB serves, compared with what its files hold.

A restored server may start, count right, and still fail, hang or lie when embeddings are asked for: so records
are fetched with their embeddings, and each sampled one must find itself among its nearest neighbours.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import sqlite3
import struct
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from backupd.drivers.chroma_state import Collection, State, collections, opened
from backupd.errors import RestoreFailed

AS_CAPTURED = "counts, records, embeddings and neighbours as captured"
"""What `compare` says when all is well."""

SAMPLE = 1000
"""Records of a collection that are fetched with their embeddings."""
QUERIES = 20
NEIGHBOURS = 10
RECALL = 0.9
"""HNSW is an approximation: this part of the sampled records must find themselves."""
_PAGE = 100
_TOLERANCE = 1e-4
"""Of a vector's length. A cosine index normalises vectors and multiplies them back: the last bits differ."""


class Unserved(Exception):
    """The server does not serve what the files hold."""


class Client:
    """One ChromaDB server, by its HTTP API version 2. Never through a proxy."""

    def __init__(self, host: str, port: int, *, timeout: float = 60.0) -> None:
        self._where = (host, port)
        self._timeout = timeout

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One request. Raises Unserved for any answer but a good one, OSError where there is none."""
        connection = http.client.HTTPConnection(*self._where, timeout=self._timeout)
        with closing(connection):
            data = None if body is None else json.dumps(body)
            connection.request(method, f"/api/v2{path}", data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if not 200 <= answer.status < 300:
                raise Unserved(
                    f"{method} {path} gives {answer.status}: {text[:200].decode(errors='replace')}"
                )
            return json.loads(text)

    def in_collection(self, collection: Collection, verb: str, body: object = None) -> Any:
        """`count`, `get` or `query`."""
        at = f"/tenants/{quote(collection.tenant)}/databases/{quote(collection.database)}"
        method = "GET" if body is None else "POST"
        return self.call(method, f"{at}/collections/{collection.id}/{verb}", body)

    def answers(self) -> bool:
        """It is there and well."""
        try:
            self.call("GET", "/heartbeat")
        except (Unserved, OSError, http.client.HTTPException, ValueError):
            return False
        return True

    def wait(self, *, timeout: float = 60.0) -> None:
        """Raises RestoreFailed when it does not answer in time."""
        deadline = time.monotonic() + timeout
        while not self.answers():
            if time.monotonic() > deadline:
                raise RestoreFailed(
                    "the restored ChromaDB does not answer", hint="its log says why: docker logs CONTAINER"
                )
            time.sleep(0.1)


def compare(client: Client, root: Path) -> str:
    """AS_CAPTURED, or the first thing that a server serves otherwise than the files in `root` hold it."""
    with opened(root, still=False) as database:
        for collection in collections(database):
            try:
                _compare_collection(client, root, database, collection)
            except (Unserved, OSError, http.client.HTTPException, ValueError) as error:
                return f"{collection.path}: {error or type(error).__name__}"
    return AS_CAPTURED


def _compare_collection(
    client: Client, root: Path, database: sqlite3.Connection, collection: Collection
) -> None:
    with closing(State(root, database, collection)) as state:
        ids = state.ids()
        count = client.in_collection(collection, "count")
        if count != len(ids):
            raise Unserved(f"the server counts {count} records, the files hold {len(ids)}")
        sample = sorted(ids, key=lambda key: hashlib.sha256(key.encode()).digest())[:SAMPLE]
        for at in range(0, len(sample), _PAGE):
            _compare_records(client, state, sample[at : at + _PAGE])
        _compare_neighbours(client, state, sample[:QUERIES])


def _compare_records(client: Client, state: State, ids: Sequence[str]) -> None:
    wanted = {"ids": list(ids), "include": ["documents", "metadatas", "embeddings"]}
    answer = client.in_collection(state.collection, "get", wanted)
    if sorted(answer["ids"]) != sorted(ids):
        raise Unserved(f"{len(answer['ids'])} of {len(ids)} records are served")
    rows = zip(answer["ids"], answer["documents"], answer["metadatas"], answer["embeddings"], strict=True)
    for key, document, metadata, embedding in rows:
        record, vector = state.record(key), state.vector(key)
        if document != record.document:
            raise Unserved(f"the document of {key!r} differs")
        if (metadata or {}) != record.metadata:
            raise Unserved(f"the metadata of {key!r} differs")
        if vector is None or not _same(embedding, _numbers(vector), state.collection.space):
            raise Unserved(f"the embedding of {key!r} differs")


def _numbers(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def _same(served: Sequence[float] | None, stored: Sequence[float], space: str) -> bool:
    if served is None or len(served) != len(stored):
        return False
    if space == "cosine":  # stored at length 1
        length = math.hypot(*served) or 1.0
        served = [number / length for number in served]
    allowed = _TOLERANCE * max(math.hypot(*stored), 1e-6)
    return all(abs(a - b) <= allowed for a, b in zip(served, stored, strict=True))


def _compare_neighbours(client: Client, state: State, ids: Sequence[str]) -> None:
    found = 0
    for key in ids:
        numbers = _numbers(state.vector(key) or b"")
        wanted = {"query_embeddings": [list(numbers)], "n_results": NEIGHBOURS, "include": ["distances"]}
        answer = client.in_collection(state.collection, "query", wanted)
        own = 1 - sum(n * n for n in numbers) if state.collection.space == "ip" else 0.0
        nearest = answer["distances"][0][:1]
        # of several equal ones, and with inner products, others may rightly be nearer
        as_near = bool(nearest) and nearest[0] <= own + 1e-3 * (1 + abs(own))
        found += key in answer["ids"][0] or as_near
    if found < RECALL * len(ids):
        raise Unserved(f"only {found} of {len(ids)} records find themselves among their neighbours")
