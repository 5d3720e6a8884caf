"""The parts of a table that workers leave, and the whole that is made of them.

A part is one parquet file below ``<out>.parts/<key>/``: rows, and in its metadata what was rejected. The whole is
written row group by row group, its bytes the same however the work was divided.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from brainlm.errors import StoreError
from brainlm.store import Store
from eval.table_plan import Job, Part, TablePlan

IDS = ("recording_id", "subject", "session", "task", "run", "site")
TEXTS = (*IDS, "split")
METADATA = b"brainlm"
REJECTED = b"rejected"
GROUP_BYTES = 32 * 1024**2
GROUP_ROWS = 4096


@dataclass(frozen=True)
class Rejected:
    """A recording without a row, and why."""

    recording_id: str
    subject: str
    split: str
    source: str
    reason: str


def parts_folder(job: Job) -> str:
    """Return the folder, beside the table, that holds the parts of this job and of earlier ones."""
    return f"{job.settings.file_name}.parts"


def part_file(job: Job, part: Part) -> str:
    return f"{parts_folder(job)}/{job.key}/{part.name}.parquet"


def write_part(store: Store, name: str, table: pa.Table | None, rejected: Sequence[Rejected]) -> None:
    """Write a part's file, atomically: rows (None = there are none) and rejections appear together."""
    table = pa.table({}) if table is None else table
    table = table.replace_schema_metadata({REJECTED: json.dumps([asdict(one) for one in rejected])})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.write_bytes(name, buffer.getbuffer())


def parts_done(store: Store, job: Job) -> set[str]:
    """Return the names of the parts that are there."""
    return {name.removesuffix(".parquet") for name in store.names(f"{parts_folder(job)}/{job.key}")}


def join_parts(store: Store, plan: TablePlan, provenance: dict[str, Any]) -> tuple[int, list[Rejected]]:
    """Write the whole table from its parts, in bounded memory; return its rows and what was rejected.

    The table of rejections is written first, so that a whole table always has it beside it. If no recording has a
    row there is no whole table.
    """
    rejected = [Rejected(**row) for row in plan.refused]
    tables = _read_parts(store, plan, rejected)
    first = next(tables, None)
    job, num_rows = plan.job, 0
    if first is not None:
        facts = plan.facts | provenance
        if "cls" in first.schema.names:
            facts |= {"width": first.schema.field("cls").type.list_size}
        schema = first.schema.with_metadata({METADATA: json.dumps(facts)})
        with store.new_file(job.settings.file_name) as path:
            with pq.ParquetWriter(path, schema, use_dictionary=list(TEXTS)) as writer:
                for group in _regrouped(first, tables):
                    writer.write_table(group.replace_schema_metadata(schema.metadata))
                    num_rows += len(group)
            write_rejected(store, job, rejected)
    else:
        write_rejected(store, job, rejected)
    return num_rows, rejected


def rejected_name(job: Job) -> str:
    return job.settings.file_name.removesuffix(".parquet") + ".rejected.parquet"


def write_rejected(store: Store, job: Job, rejected: Sequence[Rejected]) -> None:
    """Write the table of rejections, also where there are none."""
    names = list(Rejected.__dataclass_fields__)
    schema = pa.schema([(name, pa.string()) for name in names])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(one) for one in rejected], schema=schema), buffer)
    store.write_bytes(rejected_name(job), buffer.getbuffer())


def read_facts(store: Store, name: str) -> dict[str, Any]:
    """Return what a table says of itself ({} if it is another table); reads its end alone.

    Raises
    ------
    StoreError
        If it is no parquet file.
    """
    size = store.size(name)
    tail = store.read_range(name, max(0, size - 8), size)
    if tail[4:] != b"PAR1":
        raise StoreError(f"{store.url_of(name)} is there and is no parquet file: remove it, or give another out")
    footer = store.read_range(name, size - 8 - int.from_bytes(tail[:4], "little"), size)
    metadata = pq.read_metadata(io.BytesIO(b"PAR1" + footer)).metadata or {}
    facts = json.loads(metadata.get(METADATA, b"{}"))
    assert isinstance(facts, dict)
    return facts


def _read_parts(store: Store, plan: TablePlan, rejected: list[Rejected]) -> Iterator[pa.Table]:
    """Yield the rows of each part that has any, and gather rejections on the way."""
    for part in plan.parts:
        name = part_file(plan.job, part)
        try:
            table = pq.read_table(io.BytesIO(store.read_bytes(name)))
        except pa.ArrowException as error:
            raise StoreError(f"{store.url_of(name)} is damaged; remove it and run again: {error}") from error
        rejected += [Rejected(**one) for one in json.loads(table.schema.metadata[REJECTED])]
        if table.num_columns:
            yield table.replace_schema_metadata(None)


def _regrouped(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in groups of a fixed number, by the size of a row."""
    row_bytes = sum(field.type.list_size * 4 for field in first.schema if pa.types.is_fixed_size_list(field.type))
    num_rows = max(1, min(GROUP_ROWS, GROUP_BYTES // max(row_bytes, 1)))
    waiting = first
    for table in rest:
        while len(waiting) >= num_rows:
            yield waiting.slice(0, num_rows).combine_chunks()
            waiting = waiting.slice(num_rows)
        waiting = pa.concat_tables([waiting, table])
    for start in range(0, len(waiting), num_rows):
        yield waiting.slice(start, num_rows).combine_chunks()
