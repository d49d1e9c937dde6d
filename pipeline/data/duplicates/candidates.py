"""Near and exact duplicates inside a corpus: which rows to compare, which pairs match, which rows to remove.

Rows of equal pixels or equal keys share one hash. Of rows that look alike, two of the eight 16-bit bands of the look agree: a
shuffle brings together the rows that share any pair of bands, and these are compared bit by bit.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.duplicates.hashes import BANDS, MIRROR, hamming

KEY, PIXELS, LOOK, MIRRORED = range(4)  # kinds of agreement
Pairs = dict[str, np.ndarray]
"""Columns `first`, `second` (rows), `kind`, `apart` (bits that differ) and, once verified, `detail`."""
# Two bands are 32 bits, few enough rows to compare at any size of corpus. Any two of the eight bands find images that differ
# in three times as many bits as four fixed bands of 32 bits would.
BAND_PAIRS = list(itertools.combinations(range(BANDS), 2))


def candidate_keys(table: np.ndarray, number: int, keys: bool, exact: bool, near: bool) -> dict[str, np.ndarray]:
    """Rows of one slice (dtype ROW) -> lines to join on: rows with a line of equal `join` may be duplicates.

    `row` is slice << 32 | row in the slice; `kind` is KEY, PIXELS, LOOK or MIRRORED.
    """
    rows = (np.int64(number) << 32) | np.arange(len(table), dtype=np.int64)
    joins, numbers, bits, kinds = [], [], [], []

    def add(join: np.ndarray, which: np.ndarray, look: np.ndarray, kind: int) -> None:
        joins.append(join)
        numbers.append(rows[which])
        bits.append(look)
        kinds.append(np.full(len(join), kind, np.int8))

    everything = np.arange(len(table))
    if keys:
        add(table["key"], everything, table["bits"], KEY)
    if exact or near:
        add(table["exact"], everything, table["bits"], PIXELS)
    if near:
        which = np.flatnonzero(~table["flat"])
        for kind, look in ((LOOK, table["bits"][which]), (MIRRORED, table["bits"][which] ^ MIRROR)):
            bands = np.ascontiguousarray(look).view(np.uint16).reshape(-1, BANDS).astype(np.uint64)
            for pair, (i, j) in enumerate(BAND_PAIRS):
                both = bands[:, i] | bands[:, j] << np.uint64(16) | np.uint64(pair + 1) << np.uint64(32)
                add(both * np.uint64(0x9E3779B97F4A7C15), which, look, kind)  # spread: buckets by remainder are even
    look = np.concatenate(bits)
    return {
        "join": np.concatenate(joins),
        "row": np.concatenate(numbers),
        "kind": np.concatenate(kinds),
        "low": look[:, 0],
        "high": look[:, 1],
    }


def match_rows(lines: dict[str, np.ndarray], distance: int, most: int = 64) -> Pairs:
    """Lines of one bucket -> pairs of rows (first < second) that may be duplicates: KEY, PIXELS, LOOK or, when the two are
    alike as mirror images, MIRRORED.

    Among many lines with one value of `join`, each is compared with the `most` lines before it.
    """
    # The kind groups (key, pixels, look) join only within themselves; look and mirrored look join with each other.
    family = np.minimum(lines["kind"], LOOK)
    order = np.lexsort((lines["row"], lines["join"], family))
    join, row, kind, family = (a[order] for a in (lines["join"], lines["row"], lines["kind"], family))
    bits = np.stack([lines["low"], lines["high"]], axis=1)[order]
    first, second, kinds, apart = [], [], [], []

    def add(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> None:
        first.append(np.minimum(row[a], row[b]))
        second.append(np.maximum(row[a], row[b]))
        kinds.append(np.maximum(kind[a], kind[b]))
        apart.append(d)

    # Being the same is transitive: every line of a run is compared with the run's first.
    changes = np.flatnonzero((join[1:] != join[:-1]) | (family[1:] != family[:-1])) + 1
    begins = np.zeros(len(join), np.int64)
    begins[changes] = changes
    begins = np.maximum.accumulate(begins)
    rest = np.flatnonzero((family < LOOK) & (begins != np.arange(len(join))))
    add(begins[rest], rest, np.zeros(len(rest), np.int64))
    # Looking alike is not.
    looks = np.flatnonzero(family == LOOK)
    for step in range(1, most + 1):
        a, b = looks[:-step], looks[step:]
        same = join[a] == join[b]
        if not same.any():
            break
        a, b = a[same], b[same]
        d = hamming(bits[a], bits[b])
        good = (d <= distance) & (row[a] != row[b]) & ~((kind[a] == MIRRORED) & (kind[b] == MIRRORED))
        add(a[good], b[good], d[good])
    return {
        "first": np.concatenate(first),
        "second": np.concatenate(second),
        "kind": np.concatenate(kinds),
        "apart": np.concatenate(apart),
    }


def unique_pairs(pairs: Pairs) -> Pairs:
    """Each pair of rows once, by its strongest agreement: two rows may share several bands."""
    order = np.lexsort((pairs["apart"], pairs["kind"], pairs["second"], pairs["first"]))
    first, second = pairs["first"][order], pairs["second"][order]
    new = np.append(True, (first[1:] != first[:-1]) | (second[1:] != second[:-1]))[: len(order)]
    return {name: column[order][new] for name, column in pairs.items()}


class Removal(NamedTuple):
    """Why a row is removed: `first` is the row that it repeats."""

    first: int
    kind: int
    distance: int  # bits
    detail: float  # correlation of detail; 1.0 when keys or pixels are the same

    def record(self, key: str, match: str) -> dict[str, Any]:
        """The line of duplicates.parquet about the row `key`, which repeats the row `match`."""
        reason, detail = "exact" if self.kind == PIXELS else "near", round(self.detail, 3)
        return {"key": key, "reason": reason, "set": "", "match": match, "distance": self.distance, "detail": detail}


def select_removals(pairs: Pairs) -> dict[int, Removal]:
    """Which rows to remove. The first row of a group stays, and a row is removed only as a repeat of a row that stays."""
    order = np.lexsort((pairs["apart"], pairs["kind"], pairs["first"], pairs["second"]))
    removals: dict[int, Removal] = {}
    columns = (pairs[name][order].tolist() for name in ("first", "second", "kind", "apart", "detail"))
    for first, second, *why in zip(*columns, strict=True):
        if second not in removals and first not in removals:
            removals[second] = Removal(first, *why)
    return removals
