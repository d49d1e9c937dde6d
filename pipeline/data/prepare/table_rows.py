"""Rows of label tables without an image in the archives. In folders, such rows are inputs of the scan; which members an
archive has is known when all of it has been read."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.data.format import Receipt
from pipeline.data.prepare.plan import PreparePlan
from pipeline.data.prepare.worker import split_of_item
from pipeline.data.sources import Item, Source
from pipeline.data.sources.naming import Naming
from pipeline.data.sources.tables import LabelTable

logger = logging.getLogger(__name__)


def receipt_of_missing(
    plan: PreparePlan, receipts: Sequence[dict[str, Any]], shuffled: Sequence[dict[str, Any]] | None
) -> dict[str, Any] | None:
    """A receipt that lists each row without an image as a reject with the reason `missing file`, or None without such rows.

    A row has an image if any source to which its table applies has one. Rows are not counted if only some of the images were read (--sample, --include, --append). shuffled: receipts of the shuffled
    shards."""
    tabled = [
        source
        for source in plan.sources
        if not source.one_image_per_fragment and not source.downloads and _tables(source)
    ]
    if not tabled or plan.append is not None or plan.config.sample is not None or plan.config.include:
        return None
    tables = {table.uri: table for source in tabled for table in _tables(source)}
    given = next((source.naming for source in tabled if source.naming.table), None)  # --labels, for all sources
    namings = {source.prefix: source.naming if source in tabled else given for source in plan.sources}
    found: dict[str, set[str]] = {uri: set() for uri in tables}
    logger.info("prepare: looking for rows without an image in %s", ", ".join(tables))
    for key in _keys(plan, receipts, shuffled):
        for prefix, naming in namings.items():
            if naming and key.startswith(prefix) and (place := _row(naming, key[len(prefix) :])):
                found[place[0]].add(place[1])
    names, thresholds = list(plan.splits), np.cumsum(list(plan.splits.values())).tolist()
    rejects: dict[str, list[list[str]]] = {name: [] for name in names}
    for uri, table in tables.items():
        if not found[uri]:  # train.txt may list something other than images
            logger.warning("%s: names none of the images; the table is ignored", uri)
            continue
        for row in table.keys:
            if row not in found[uri]:
                item = Item(row, uri, b"", table.labels.get(row), split=table.splits.get(row))
                rejects[split_of_item(item, plan, thresholds)].append(
                    [row, uri, "missing file", "no such image in the archives"]
                )
    if not any(rejects.values()):
        return None
    nothing = dict.fromkeys(names, 0)
    return {
        "inputs": {name: len(rows) for name, rows in rejects.items()},
        "rejects": rejects,
        "duplicates": {name: [] for name in names},
        "reported": {},
        "skipped": nothing,
        "deleted": nothing,
        "again": {name: [] for name in names},
        "temporary": [],
        "alike": 0,
        "splits": {name: Receipt().to_dict() for name in names},
    }


def _tables(source: Source) -> list[LabelTable]:
    return list(source.naming.by_folder_of_table().values())


def _row(naming: Naming, path: str) -> tuple[str, str] | None:
    """(URI of the table, row) of an image. Its key may have the name of its archive in front."""
    while True:
        found = naming.row(path)
        if found is not None and found[2] is not None:
            return found[0].uri, found[2]
        if "/" not in path:
            return None
        path = path.partition("/")[2]


def _keys(
    plan: PreparePlan, receipts: Sequence[dict[str, Any]], shuffled: Sequence[dict[str, Any]] | None
) -> Iterator[str]:
    """The keys of all inputs."""
    written = [receipt["splits"] for receipt in receipts] if shuffled is None else shuffled
    for name in plan.splits:
        for part in written:
            for head in plan.open_rows(part[name], name).heads():
                yield from head.keys
        for receipt in receipts:
            yield from (row[0] for row in receipt["rejects"][name])
            yield from (record["key"] for record in receipt["duplicates"][name])
