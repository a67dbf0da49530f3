"""ChromaDB in the demo: what is written, what is changed, how all of it is measured. Over its HTTP API."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Iterator
from typing import Any

from backupd.demo.picture import Picture, digest
from backupd.errors import BackupdError

DIMENSIONS, DOCUMENTS, QUERIES = 64, 600, 10
COLLECTIONS = ("manuals", "tickets")
BASE = "/api/v2/tenants/default_tenant/databases/default_database/collections"

Address = tuple[str, int]


def ask(address: Address, method: str, path: str, body: object = None) -> Any:
    """One request; the JSON of its answer. Never through a proxy. Raises BackupdError."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        said = answer.read()
    except OSError as error:
        raise BackupdError(f"ChromaDB does not answer at {address[0]}:{address[1]}: {error}") from error
    finally:
        connection.close()
    if answer.status >= 300:
        raise BackupdError(f"ChromaDB answered {answer.status} to {method} {path}: {said[:200]!r}")
    return json.loads(said or b"null")


def _vectors(seed: str, count: int) -> list[list[float]]:
    numbers = random.Random(seed)  # noqa: S311  made up, and the same in each run
    return [[round(numbers.gauss(0, 1), 4) for _ in range(DIMENSIONS)] for _ in range(count)]


def _add(address: Address, collection: str, first: int, count: int) -> None:
    names = range(first, first + count)
    ask(
        address,
        "POST",
        f"{BASE}/{_identity(address, collection)}/upsert",
        {
            "ids": [f"{collection}-{i}" for i in names],
            "embeddings": _vectors(f"{collection} {first}", count),
            "documents": [f"{collection} document {i}: {digest(i)}" for i in names],
            "metadatas": [{"page": i, "topic": f"topic {i % 9}", "draft": i % 2 == 0} for i in names],
        },
    )


def _identity(address: Address, collection: str) -> str:
    return str(ask(address, "GET", f"{BASE}/{collection}")["id"])


def fill(address: Address) -> None:
    """Two collections of documents with metadata and embeddings."""
    for collection in COLLECTIONS:
        ask(address, "POST", BASE, {"name": collection, "metadata": {"owner": "productdemo"}})
        for first in range(0, DOCUMENTS, 200):
            _add(address, collection, first, 200)


def change(address: Address) -> None:
    """Documents replaced, removed and added, and one collection dropped."""
    _add(address, "manuals", 100, 50)
    _add(address, "manuals", DOCUMENTS, 150)
    gone = {"ids": [f"manuals-{i}" for i in range(0, 100, 3)]}
    ask(address, "POST", f"{BASE}/{_identity(address, 'manuals')}/delete", gone)
    ask(address, "DELETE", f"{BASE}/tickets")


def look(address: Address) -> Picture:
    """Every record with its embedding, and the nearest neighbours of stored queries: counts alone prove nothing."""
    things: dict[str, str] = {}
    records = 0
    collections = ask(address, "GET", BASE)
    for collection in collections:
        name, path = collection["name"], f"{BASE}/{collection['id']}"
        things[f"{name}: metadata"] = digest(json.dumps(collection["metadata"], sort_keys=True))
        for record in _records(address, path):
            things[f"{name}: {record[0]}"] = digest(*(json.dumps(part, sort_keys=True) for part in record))
            records += 1
        query = {"query_embeddings": _vectors("queries", QUERIES), "n_results": 5, "include": ["distances"]}
        found = ask(address, "POST", f"{path}/query", query)
        for number, (ids, distances) in enumerate(zip(found["ids"], found["distances"], strict=True)):
            near = [f"{identity} {distance:.4f}" for identity, distance in zip(ids, distances, strict=True)]
            things[f"{name}: neighbours of query {number}"] = digest(*near)
    many = "s" * (len(collections) > 1)
    return Picture(f"{records:,} embeddings in {len(collections)} collection{many}", things)


def _records(address: Address, path: str) -> Iterator[tuple[object, ...]]:
    offset, limit = 0, 300
    while True:
        wanted = {"include": ["documents", "metadatas", "embeddings"], "limit": limit, "offset": offset}
        got = ask(address, "POST", f"{path}/get", wanted)
        yield from zip(got["ids"], got["documents"], got["metadatas"], got["embeddings"], strict=True)
        if len(got["ids"]) < limit:
            return
        offset += limit
