"""Exact and near duplicates within a corpus: candidate keys, matching pairs, and the rows to remove.

Rows with equal pixels or equal keys have the same hash. Rows with similar views have a join key in common
(`hashes.join_keys`): a shuffle groups views by join key, and views of one group are compared bit by bit.
"""

from typing import Any, NamedTuple

import numpy as np

from pipeline.data.duplicates.hashes import compare_bits, join_keys

KEY, PIXELS, PERCEPTUAL, DESCRIPTOR = range(4)  # kinds of agreement
Pairs = dict[str, np.ndarray]
"""The columns of PAIR, one line for each agreement; after verification also `detail` and `difference`."""
PAIR = np.dtype(
    [
        ("first", "i8"),  # rows, first < second
        ("second", "i8"),
        ("kind", "i1"),
        ("hamming", "i4"),  # number of bits that differ between the two views
        ("similarity", "f4"),  # cosine similarity of descriptors
        ("mirrored", "?"),  # one view is similar to the mirror image of the other
        ("first_box", "u8"),  # boxes of the views (see hashes.VIEW), packed
        ("second_box", "u8"),
    ]
)
ALIGNMENTS = 3  # maximum number of view pairs per pair of rows that verification starts from


def as_pairs(columns: dict[str, Any]) -> Pairs:
    """The columns of PAIR. Missing columns are zero."""
    size = len(columns["first"])
    return {name: np.asarray(columns.get(name, np.zeros(size)), PAIR[name]) for name in PAIR.names or ()}


def concatenate_pairs(parts: list[Pairs]) -> Pairs:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else no_pairs()


def no_pairs() -> Pairs:
    return as_pairs({"first": ()})


def candidate_lines(
    rows: np.ndarray, views: np.ndarray, number: int, keys: bool, exact: bool, near: bool
) -> dict[str, np.ndarray]:
    """Lines to join, from the rows (dtype ROW) and views (VIEW) of one slice: rows whose lines have equal `join` may be
    duplicates.

    `row` is slice << 32 | row in the slice; `kind` is KEY, PIXELS or PERCEPTUAL.
    """
    names = (np.int64(number) << 32) | np.arange(len(rows), dtype=np.int64)
    nothing = np.zeros((len(rows), 2), np.uint64), np.zeros(len(rows), np.uint64)
    parts: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.uint64), names[:0], nothing[0][:0], nothing[1][:0])]
    kinds = [np.empty(0, np.int8)]
    if keys:
        parts.append((rows["key"], names, *nothing))
        kinds.append(np.full(len(rows), KEY, np.int8))
    if exact or near:
        parts.append((rows["exact"], names, *nothing))
        kinds.append(np.full(len(rows), PIXELS, np.int8))
    if near:
        which, joins = join_keys(views)
        boxes = np.ascontiguousarray(views["box"]).view(np.uint64).ravel()
        parts.append((joins, names[views["image"][which]], views["bits"][which], boxes[which]))
        kinds.append(np.full(len(joins), PERCEPTUAL, np.int8))
    join, row, bits, box = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return {"join": join, "row": row, "kind": np.concatenate(kinds), "low": bits[:, 0], "high": bits[:, 1], "box": box}


def match_rows(lines: dict[str, np.ndarray], distance: int, most: int = 64) -> Pairs:
    """Pairs of rows that may be duplicates, from the lines of one bucket.

    If many lines have the same `join`, each is compared only with the `most` preceding lines.
    """
    order = np.lexsort((lines["row"], lines["join"], lines["kind"]))
    join, row, kind, box = (lines[name][order] for name in ("join", "row", "kind", "box"))
    bits = np.stack([lines["low"], lines["high"]], axis=1)[order]
    # Equality is transitive, so every line of a run is compared with its first line.
    changes = np.flatnonzero((join[1:] != join[:-1]) | (kind[1:] != kind[:-1])) + 1
    begins = np.zeros(len(join), np.int64)
    begins[changes] = changes
    begins = np.maximum.accumulate(begins)
    rest = np.flatnonzero((kind < PERCEPTUAL) & (begins != np.arange(len(join))))
    found = [as_pairs({"first": row[begins[rest]], "second": row[rest], "kind": kind[rest]})]
    # Similarity is not transitive.
    similar = np.flatnonzero(kind == PERCEPTUAL)
    for step in range(1, most + 1):
        a, b = similar[:-step], similar[step:]
        same = join[a] == join[b]
        if not same.any():
            break
        a, b = a[same], b[same]
        hamming, mirrored = compare_bits(bits[a], bits[b])
        good = (hamming <= distance) & (row[a] != row[b])  # lines are sorted by row
        a, b = a[good], b[good]
        found.append(
            as_pairs(
                {
                    "first": row[a],
                    "second": row[b],
                    "kind": kind[a],
                    "hamming": hamming[good],
                    "mirrored": mirrored[good],
                    "first_box": box[a],
                    "second_box": box[b],
                }
            )
        )
    return concatenate_pairs(found)


def unique_pairs(pairs: Pairs) -> Pairs:
    """The strongest agreements of each pair of rows: one if keys or pixels are equal, otherwise at most ALIGNMENTS."""
    names = ("second_box", "first_box", "mirrored", "hamming", "similarity", "kind", "second", "first")
    order = np.lexsort([-pairs[name] if name == "similarity" else pairs[name] for name in names])
    sorted_pairs = {name: column[order] for name, column in pairs.items()}
    same = np.ones(max(0, len(order) - 1), bool)
    for name in ("first", "second"):
        same &= sorted_pairs[name][1:] == sorted_pairs[name][:-1]
    repeated = same.copy()
    for name in ("kind", "mirrored", "first_box", "second_box"):  # views may share several keys
        repeated &= sorted_pairs[name][1:] == sorted_pairs[name][:-1]
    keep = np.append(True, ~repeated)[: len(order)]
    sorted_pairs = {name: column[keep] for name, column in sorted_pairs.items()}
    first, second = sorted_pairs["first"], sorted_pairs["second"]
    place = np.arange(len(first))
    begins = np.append(True, (first[1:] != first[:-1]) | (second[1:] != second[:-1]))[: len(first)]
    begin = np.maximum.accumulate(np.where(begins, place, 0))
    keep = begins | ((sorted_pairs["kind"][begin] >= PERCEPTUAL) & (place - begin < ALIGNMENTS))
    keep |= (sorted_pairs["kind"] == DESCRIPTOR) & (sorted_pairs["kind"][begin] == PERCEPTUAL)
    return {name: column[keep] for name, column in sorted_pairs.items()}


def boxes(packed: np.ndarray) -> np.ndarray:
    """Packed boxes (n,) -> (n, 4) float16."""
    return np.ascontiguousarray(packed).view(np.float16).reshape(-1, 4)


class Removal(NamedTuple):
    """Why a row is removed. `first` is the row that is kept."""

    first: int
    kind: int
    distance: int  # bits
    similarity: float  # of descriptors; 0.0 if they were not compared
    detail: float  # correlation of detail; 1.0 if keys or pixels are equal
    difference: float  # largest local difference, on a scale of 255

    @property
    def reason(self) -> str:
        return {PIXELS: "exact", PERCEPTUAL: "near", DESCRIPTOR: "descriptor"}[self.kind]

    def record(self, key: str, match: str, of_set: str = "") -> dict[str, Any]:
        """The row of duplicates.parquet for the row `key`, a duplicate of `match` (in
        evaluation set `of_set`, if given)."""
        return {
            "key": key,
            "reason": self.reason,
            "set": of_set,
            "match": match,
            "distance": self.distance,
            "similarity": round(self.similarity, 4),
            "detail": round(self.detail, 3),
            "difference": round(self.difference, 1),
        }


def select_removals(pairs: Pairs) -> dict[int, Removal]:
    """{row: why it is removed}. A row is removed only if it is a duplicate of an earlier row that is kept."""
    order = np.lexsort((-pairs["detail"], pairs["kind"], pairs["first"], pairs["second"]))
    names = ("first", "second", "kind", "hamming", "similarity", "detail", "difference")
    removals: dict[int, Removal] = {}
    for first, second, *why in zip(*(pairs[name][order].tolist() for name in names), strict=True):
        if second not in removals and first not in removals:
            removals[second] = Removal(first, *why)
    return removals
