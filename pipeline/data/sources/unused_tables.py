"""Finds label tables that no name shows, so that folders are not taken for classes while a table says otherwise."""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.sources.columns import Columns
from pipeline.data.sources.layout import Layout
from pipeline.data.sources.listing import address_of
from pipeline.data.sources.tables import LabelTable, read_label_table
from pipeline.errors import StorageError, UserError

LIKELY_NAME = re.compile(r"label|class|annot|meta|target|truth|train|entry|list|split|partition", re.IGNORECASE)
NO_TABLE = re.compile(r"readme|licen[cs]e|requirements|changelog|citation|checksum|md5|sha\d", re.IGNORECASE)
ENDS = r"(?i)\.(csv|tsv|txt|lst|jsonl|json|parquet)$"
WHOLE_BYTES, HEAD_BYTES = 32 << 20, 1 << 20  # larger text is read to HEAD_BYTES, other larger files are not
MAX_TABLES = 8  # files that are read
SAMPLE = 2000  # images that are looked up
MIN_FOUND = 0.3  # fraction of them that a table about the images lists
MIN_AGREEING = 0.95  # fraction of images whose label in the table follows from their folder
logger = logging.getLogger(__name__)


def check_unused_tables(
    uri: str, files: pa.Table, layout: Layout, columns: Columns, is_image: Callable[[str], bool]
) -> None:
    """Raises UserError if a file in the listing `files` is a table of the images whose labels or splits differ from those
    of their folders; warns about a table of other properties."""
    tables = _candidates(files)
    if not tables:
        return
    paths = [path for path in _sample(files["path"]) if is_image(path)]
    for path, size in tables:
        table = _read(address_of(uri, path), size, columns)
        rows = {image: key for image in paths if (key := table.find(image)) is not None}
        if len(rows) < max(2, MIN_FOUND * len(paths)):
            continue
        if table.labels and not _agree(table, rows, layout):
            what = "labels"
        elif table.splits.keys() & rows.values() and layout.split_level is None and not layout.split_in_file_name:
            what = "splits"
        else:
            if not table.labels:
                logger.warning("%s: %s lists the images, but the classes are the folders; --labels reads it", uri, path)
            continue
        raise UserError(
            f"{uri}: {path} gives the images other {what} than their folders; --labels {address_of(uri, path)} reads the "
            f"table, --class-level {1 + (layout.class_level or 0)} ignores it and uses the folders as classes"
        )


def _candidates(files: pa.Table) -> list[tuple[str, int]]:
    """(path, bytes) of the files that are most likely tables."""
    found = files.filter(pc.match_substring_regex(files["path"], ENDS)) if files.num_rows else files
    if found.num_rows > 1000 * MAX_TABLES:  # one file for each image
        return []
    named = [
        (not LIKELY_NAME.search(name), path.count("/"), path, size)
        for path, size in zip(found["path"].to_pylist(), found["size"].to_pylist(), strict=True)
        if not NO_TABLE.search(name := path.rpartition("/")[2])
    ]
    return [(path, size) for _, _, path, size in sorted(named)[:MAX_TABLES]]


def _sample(paths: pa.ChunkedArray) -> list[str]:
    places = np.unique(np.linspace(0, len(paths) - 1, SAMPLE).astype(int)).tolist()
    return [paths[place].as_py() for place in places]


def _read(uri: str, size: int, columns: Columns) -> LabelTable:
    """The table, or its first rows; empty if the file is not a table of files."""
    try:
        data = None
        if size > WHOLE_BYTES:
            if uri.lower().endswith((".json", ".parquet")):
                return LabelTable()
            data = storage.read_range(uri, 0, HEAD_BYTES).rpartition(b"\n")[0]
        return read_label_table(uri, columns, need_labels=False, data=data)
    except StorageError:
        raise
    except UserError:
        return LabelTable()


def _agree(table: LabelTable, rows: dict[str, str], layout: Layout) -> bool:
    """Whether the label of an image in the table follows from its folder, as in lists of ant/0.jpg and a number."""
    by_folder: defaultdict[str | None, Counter[str]] = defaultdict(Counter)
    for image, key in rows.items():
        for name in table.labels.get(key, ()):
            by_folder[layout.label(image)][name] += 1
    total = sum(sum(found.values()) for found in by_folder.values())
    return sum(found.most_common(1)[0][1] for found in by_folder.values()) >= MIN_AGREEING * total
