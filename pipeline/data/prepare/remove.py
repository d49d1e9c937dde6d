"""Removes duplicate rows from the corpus, or only lists them with `--deduplicate report`."""

from collections.abc import Iterator
from typing import Any

from pipeline.data.duplicates.candidates import KEY, PERCEPTUAL, Removal
from pipeline.data.duplicates.report import attach_pictures
from pipeline.data.prepare.pairs import ROW_BITS, finish_units, places_of_rows, read_copies
from pipeline.data.prepare.plan import PreparePlan, slice_name

Removals = dict[int, Removal]
"""{row number: removal}; a row number is slice << 32 | row in the slice."""


def deduplicated_name(number: int) -> str:
    """Name of the receipt of a slice from which duplicates were removed."""
    return f"deduplicated-{number:05d}"


def remove_duplicates(plan: PreparePlan, removals: Removals) -> None:
    """Rewrites the slices that lose rows, from their own shards, with a new receipt."""
    wanted: dict[int, set[int]] = {}
    for removal in removals.values():
        wanted.setdefault(removal.first >> 32, set()).add(removal.first & ROW_BITS)
    keys = {
        (number << 32) | row: key
        for number, rows in wanted.items()
        if number < len(plan.slices)
        for row, key in _keys(plan, number, rows)
    }
    units: dict[str, tuple[int, dict[int, tuple[str, Removal]]]] = {}
    for row, removal in sorted(removals.items()):
        number = row >> 32
        match = keys.get(removal.first, "")  # the keys of evaluation images are stored with their small copies
        units.setdefault(deduplicated_name(number), (number, {}))[1][row & ROW_BITS] = (match, removal)
    finish_units(plan, units, _keep_rows)


def _keys(plan: PreparePlan, number: int, rows: set[int]) -> Iterator[tuple[int, str]]:
    (receipt,), places = plan.receipts.read([slice_name(number)]), places_of_rows(plan, number)
    keys = {
        name: [key for head in plan.open_rows(receipt["splits"][name], name).heads() for key in head.keys]
        for name in plan.splits
    }
    for row in rows:
        split, place = places[row]
        yield row, keys[split][place]


def _keep_rows(unit: tuple[int, dict[int, tuple[str, Removal]]], plan: PreparePlan) -> dict[str, Any]:
    """Copies the rows of a slice that are kept. The receipt lists the removed rows, or with `report` the duplicates."""
    number, removals = unit
    (receipt,), places = plan.receipts.read([slice_name(number)]), places_of_rows(plan, number)
    at = {places[row]: row for row in removals}
    looked_at = {number << 32 | row: why.first for row, (_, why) in removals.items() if why.kind >= PERCEPTUAL}
    copies = read_copies(plan, {*looked_at, *looked_at.values()})
    source = plan.sources[plan.slices[number].source].uri
    receipt.setdefault("reported", {})
    for name in plan.splits:
        found: dict[str, list[Any]] = {"duplicates": [], "reported": []}
        pictures: dict[str, list[Any]] = {"duplicates": [], "reported": []}
        dataset = plan.open_rows(receipt["splits"][name], name)
        place = 0
        with plan.writer(name, number, "k") as writer:
            for i in range(len(dataset.row_groups)):
                for key, *rest in dataset.read_row_group(i).rows():
                    row = at.get((name, place))
                    place += 1
                    if row is None:
                        writer.write(key, *rest)
                        continue
                    match, removal = removals[row]
                    if removal.kind == KEY:
                        receipt["rejects"][name].append([key, source, "duplicate key", ""])
                        continue
                    uri = _set_of(plan, removal.first)
                    mine, other = copies.get(number << 32 | row, ("", b"")), copies.get(removal.first, ("", b""))
                    where = "reported" if plan.config.deduplicate == "report" and not uri else "duplicates"
                    found[where].append(removal.record(key, match or other[0], uri))
                    pictures[where].append((mine[1], other[1]))
                    if where == "reported":
                        writer.write(key, *rest)
        for where, records in found.items():
            attach_pictures(records, pictures[where])
            receipt[where].setdefault(name, []).extend(records)
        # keep the mean and standard deviation that were measured before the removal
        receipt["splits"][name] = writer.receipt.to_dict() | {"pixels": receipt["splits"][name]["pixels"]}
    return receipt


def _set_of(plan: PreparePlan, row: int) -> str:
    """The evaluation set of a row; empty for a row of the corpus."""
    number = row >> 32
    return "" if number < len(plan.slices) else plan.evaluation_parts[number - len(plan.slices)][0]
