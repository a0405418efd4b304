"""Tables in the Lance format, in object storage or a shared folder. Needs the extra ``lance``, and no server.

Searches compare all vectors, unless an index was built with LanceDB. Each write adds a version of the table. Versions
that are an hour old are removed when the database is closed after writing.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import numpy as np

from ...errors import MissingDependencyError, RetrievalError
from .database import RECORDS_PER_REQUEST, Record, Table, in_parts
from .urls import IndexUrl

VISIBLE_AFTER = timedelta(seconds=5)  # delay until a reader sees what another process wrote
KEPT_VERSIONS = timedelta(hours=1)  # for readers that still use them
_SUFFIX = "-files"


class LanceDatabase:
    """The tables in one folder or bucket.

    S3 is used with the environment variables of AWS, among them ``AWS_ENDPOINT_URL``.

    Raises:
        MissingDependencyError: lancedb is not installed.
        RetrievalError: the place cannot be used.
    """

    def __init__(self, url: IndexUrl) -> None:
        self._url = url
        try:
            lancedb: Any = import_module("lancedb")  # it has no types when it is not installed
            self._arrow: Any = import_module("pyarrow")
        except ImportError as error:
            raise MissingDependencyError.of_extra("an index in Lance", str(error.name), "lance") from error
        with self._explained():
            self._database = lancedb.connect(
                url.address.removeprefix("file://"),
                read_consistency_interval=VISIBLE_AFTER,
                storage_options=_storage_options(url.address),
            )
        self._tables: dict[str, Any] = {}
        self._written: set[str] = set()

    @property
    def location(self) -> str:
        return self._url.text

    def collections(self) -> list[str]:
        return [name.removesuffix(_SUFFIX) for name in self._names() if name.endswith(_SUFFIX)]

    def read(self, collection: str, table: Table, ids: Sequence[str]) -> list[Record]:
        opened = self._existing(collection, table)
        if opened is None:
            return []
        with self._explained():
            found = [opened.search().where(_where(part)).limit(len(part)).to_list() for part in in_parts(ids)]
        return [_record(row) for page in found for row in page]

    def scan(self, collection: str, table: Table) -> Iterator[Record]:
        opened = self._existing(collection, table)
        if opened is None:
            return
        with self._explained():
            for batch in opened.search().select(["id", "payload"]).to_batches(RECORDS_PER_REQUEST):
                yield from map(_record, batch.to_pylist())

    def write(self, collection: str, table: Table, records: Sequence[Record]) -> None:
        if not records:
            return
        size = None if records[0].vector is None else len(records[0].vector)
        columns = {"id": [record.id for record in records], "payload": [record.payload for record in records]}
        vectors = {} if size is None else {"vector": [record.vector for record in records]}
        data = self._arrow.table({**columns, **vectors}, schema=self._schema(size))
        name = _name(collection, table)
        with self._explained():
            if name not in self._tables:
                self._tables[name] = self._database.create_table(name, schema=self._schema(size), exist_ok=True)
            merge = self._tables[name].merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(data)
        self._written.add(name)

    def remove(self, collection: str, table: Table, ids: Sequence[str]) -> None:
        opened = self._existing(collection, table)
        if opened is None:
            return
        with self._explained():
            for part in in_parts(ids):
                opened.delete(_where(part))
        self._written.add(_name(collection, table))

    def nearest(self, collection: str, vector: np.ndarray, count: int) -> list[tuple[float, Record]]:
        opened = self._existing(collection, "texts")
        if opened is None:
            return []
        with self._explained():
            search: Any = opened.search(vector, vector_column_name="vector")
            rows = search.distance_type("cosine").select(["id", "payload", "_distance"]).limit(count).to_list()
        return [(row["_distance"], _record(row)) for row in rows]

    def close(self) -> None:
        """Join the small files of this process's writes, and remove old versions."""
        with self._explained():
            for name in sorted(self._written):
                self._tables[name].optimize(cleanup_older_than=KEPT_VERSIONS)
        self._written.clear()
        self._tables.clear()

    def _existing(self, collection: str, table: Table) -> Any:
        """Return a table, or None if it does not exist."""
        name = _name(collection, table)
        if name not in self._tables:
            if name not in self._names():
                return None
            with self._explained():
                self._tables[name] = self._database.open_table(name)
        return self._tables[name]

    def _schema(self, size: int | None) -> Any:
        arrow = self._arrow
        fields = [arrow.field("id", arrow.string()), arrow.field("payload", arrow.string())]
        if size is not None:
            fields.append(arrow.field("vector", arrow.list_(arrow.float32(), size)))
        return arrow.schema(fields)

    def _names(self) -> list[str]:
        names: list[str] = []
        token: str | None = None
        with self._explained():
            while True:
                page = self._database.list_tables(page_token=token, limit=RECORDS_PER_REQUEST)
                names += page.tables
                token = page.page_token
                if not token:
                    return names

    @contextmanager
    def _explained(self) -> Generator[None, None, None]:
        """Turn errors of the library into ours."""
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            cause = " ".join(str(error).split())[:200]
            raise RetrievalError(f"the index {self._url.text!r} cannot be used: {cause}") from error


def _storage_options(address: str) -> dict[str, str] | None:
    """Return the options of object storage that Lance does not read from the environment."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not address.startswith("s3://") or not endpoint:
        return None
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


def _name(collection: str, table: Table) -> str:
    return collection + (_SUFFIX if table == "files" else "")


def _where(ids: Sequence[str]) -> str:
    """Return the condition that a record has one of these ids, which are hexadecimal digits."""
    return f"id IN ({', '.join(repr(id) for id in ids)})"


def _record(row: dict[str, Any]) -> Record:
    vector = row.get("vector")
    return Record(row["id"], row["payload"], None if vector is None else np.asarray(vector, dtype=np.float32))
