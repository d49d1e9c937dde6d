"""Where images come from: every supported layout read as one stream of (key, bytes, label names).

    class folders       root/<class>/**/*        the class is the first folder
    folder + labels     any files, and a CSV, JSONL or Parquet table of file name and label(s)
    tar archives        WebDataset samples (.jpg + .cls/.txt/.json), class folders in a tar, ImageNet's tar of tars
    Parquet             an image column (bytes, or Hugging Face's struct of bytes and path) and a label column
    TFRecord            tf.train.Example with image/encoded and image/class/label or image/class/text
    CIFAR-10/100        the published archives, binary or Python version

`discover` looks at a source once, on the driver, and returns a `Source`: a table of *pieces*, each an independent range of
the input (one image file, a stretch of a tar, some row groups) with its size. `read` turns pieces into `Item`s, anywhere.
Label names are text throughout; `Labels` turns them into class indices. What operating systems leave in folders and archives
(.DS_Store, Thumbs.db, desktop.ini, ._* and __MACOSX) is no input.
"""

import asyncio
import contextlib
import csv
import fnmatch
import io
import itertools
import json
import os
import re
import stat
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any, Literal, NamedTuple

import fsspec.asyn
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.images import Refused
from pipeline.data.sources import cifar, tfrecord
from pipeline.errors import UserError, nearest

Kind = Literal["folder", "tar", "parquet", "tfrecord", "cifar"]
Format = Literal["auto", "folder", "tar", "parquet", "tfrecord", "cifar"]

IMAGE_NAMES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
TAR = re.compile(r"\.(tar|tar\.gz|tgz)$", re.IGNORECASE)
TFRECORD = re.compile(r"(\.tfrecords?$|[.-]tfrecord(-\d+-of-\d+)?$|-\d{5}-of-\d{5}$)", re.IGNORECASE)
CIFAR = re.compile(r"cifar-100?-(binary|python)\.(tar|tar\.gz|tgz)$")
WORDNET = re.compile(r"(n\d{8})(?![0-9])")
WHOLE = re.compile(r"-?[0-9]{1,18}")
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
LABEL_TABLES = ("labels", "metadata")  # found by themselves in a folder: labels.csv, metadata.jsonl, ...
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image_path", "image", "key", "image_id", "id", "name")
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "classes",
    "class_name",
    "labelname",
    "category",
    "target",
    "cls",
    "fine_label",
)
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes", "content")
MAX_FILE_BYTES = 1 << 30  # no image is larger; a member of an archive that is, is a bomb
SEPARATORS = re.compile(r"[;|]")  # between the labels of a column named in the plural
SIDECARS = ("cls", "txt", "json")  # labels of a sample in a tar, the first that has one
LITTER = r"(?i)(?:^|/)(?:\._[^/]*|\.ds_store|thumbs\.db|desktop\.ini|__macosx/.*)$"
MOST_NUMBERS = 1_000_000  # whole numbers up to here are class indices, larger ones are names like any other


class Item(NamedTuple):
    """One input. `image` is the file's bytes or uint8 pixels (H, W, 3); `labels` are names, None when there is no label.
    An input that cannot be read has `refused` and no image."""

    key: str
    source: str
    image: bytes | np.ndarray
    labels: Sequence[str] | None
    refused: Refused | None = None


PIECES = pa.schema(
    [
        ("path", pa.large_string()),  # relative to the source
        ("size", pa.int64()),  # bytes of input, for cutting units of even work
        ("start", pa.int64()),  # byte offset (tar), first row group (parquet); else 0
        ("stop", pa.int64()),  # end of the range; -1 for the end of the file
        ("labels", pa.list_(pa.string())),  # known beforehand, or null
    ]
)


LISTING = pa.schema([PIECES.field("path"), PIECES.field("size")])
SPILL_ROWS = 1 << 12  # of a listing that are held at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source, looked through. `names` are the label names met (None when only reading the images would tell)."""

    uri: str
    kind: Kind
    prefix: str  # goes before every key, "" for a single source
    pieces: pa.Table
    names: frozenset[str] | None
    ordered_names: tuple[str, ...] | None = None  # when the source itself says which index has which name
    multilabel: bool = False
    table: dict[str, list[str]] = field(default_factory=dict)  # file name -> labels, for archives
    by_folder: bool = False  # the names are those of folders
    by_archive: bool = False  # archives repeat each other's keys: the archive's name goes before them
    problem: str = ""  # why an archive could not be looked through to its end

    @property
    def listed(self) -> bool:
        """Every piece is one file, so that any order of pieces is a shuffle of images."""
        return self.kind == "folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Label names -> class indices. Without classes nothing is labelled."""

    classes: tuple[str, ...]
    index: dict[str, int]
    multilabel: bool
    unlabelled: bool = False

    def encode(self, names: Sequence[str] | None) -> int | list[int]:
        """Raises Refused for an input without a label or with one that is no class."""
        if self.unlabelled:
            return -1
        if names is None or (not names and not self.multilabel):
            raise Refused("no label")
        try:
            indices = [self.index[name] for name in names]
        except KeyError as error:
            raise Refused("unknown label", str(error.args[0])) from error
        if self.multilabel:
            return sorted(set(indices))
        if len(indices) > 1:
            raise Refused("unknown label", f"{len(indices)} labels where one is expected")
        return indices[0]


# ---------------------------------------------------------------- labels


def read_label_map(uri: str | None) -> list[str] | dict[str, str] | None:
    """`--label-map`: a text file or JSON list of class names in index order, or a JSON object {name: new name}."""
    if uri is None:
        return None
    text = _read_text(uri)
    try:
        value = json.loads(text)
    except ValueError:
        value = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value.values()):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if len(set(value)) != len(value):
            raise UserError(f"{uri}: the class list repeats {sorted(n for n in set(value) if value.count(n) > 1)[0]!r}")
        return value
    raise UserError(f"{uri}: expected class names, one per line, or a JSON list, or a JSON object of name: new name")


def make_labels(
    sources: Sequence[Source], label_map: list[str] | dict[str, str] | None = None, unlabelled: bool = False
) -> Labels:
    """The classes of all sources together: in the given order, in the sources' own order, or sorted by name. Whole numbers
    that are not names of folders are indices: 0 to the largest. Raises UserError when there is no class."""
    if unlabelled:
        return Labels(classes=(), index={}, multilabel=False, unlabelled=True)
    multilabel = any(source.multilabel for source in sources)
    own = {source.ordered_names for source in sources if source.ordered_names}
    names = {name for source in sources for name in source.names or ()}
    if isinstance(label_map, list):
        classes = tuple(label_map)
    elif len(own) == 1 and all(source.ordered_names for source in sources):
        classes = next(iter(own))
    elif names and all(WHOLE.fullmatch(name) for name in names) and not any(s.by_folder for s in sources):
        numbers = sorted(names, key=int)
        plain = int(numbers[0]) >= 0 and int(numbers[-1]) < MOST_NUMBERS and all(str(int(n)) == n for n in numbers)
        classes = tuple(str(i) for i in range(int(numbers[-1]) + 1)) if plain else tuple(numbers)
    else:
        classes = tuple(sorted(names))
    if isinstance(label_map, dict):
        classes = tuple(sorted(set(label_map.values())))
        place = {name: i for i, name in enumerate(classes)}
        renamed = {old: place[new] for old, new in label_map.items()}
        return Labels(classes=classes, index=renamed, multilabel=multilabel)
    problem = next((source.problem for source in sources if source.problem), "")
    if not classes and problem:
        raise UserError(f"{problem}; no label was found")
    if not classes:
        raise UserError(
            f"{sources[0].uri}: zero classes; expected class folders (root/<class>/image.jpg), or labels.csv beside the images "
            "(or --labels FILE), or labelled tar, Parquet or TFRecord files; --unlabelled takes images without labels"
        )
    by_number = isinstance(label_map, list) or bool(own)  # 7 may stand for the name of class 7
    index = {str(i): i for i in range(len(classes))} if by_number else {}
    index |= {name: i for i, name in enumerate(classes)}
    return Labels(classes=classes, index=index, multilabel=multilabel)


def read_label_table(uri: str) -> tuple[dict[str, list[str]], bool]:
    """{file name: labels} and whether it is multi-label, from a CSV, JSONL, JSON or Parquet table, or ImageNet's devkit.

    The label column is multi-label when it holds lists, when it is named in the plural and separates by ; or |, or when a
    file stands on several lines with different labels: it has all of them.
    """
    name = uri.lower()
    if "devkit" in name and TAR.search(name):
        return _imagenet_devkit(uri), False
    try:
        if name.endswith((".csv", ".tsv")):
            text = _read_text(uri)
            head = text.partition("\n")[0]
            delimiter = max(",;\t", key=head.count)  # the first of them when none is there
            rows: list[Any] = list(
                csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
            )
        elif name.endswith(".jsonl") or name.endswith(".ndjson"):
            rows = [json.loads(line) for line in _read_text(uri).splitlines() if line.strip()]
        elif name.endswith(".json"):
            value = json.loads(_read_text(uri))
            rows = [{"file": k, "label": v} for k, v in value.items()] if isinstance(value, dict) else value
        elif name.endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
        else:
            raise UserError(f"{uri}: labels are read from .csv, .tsv, .jsonl, .json or .parquet")
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot read the label table ({error})") from error
    if not rows or not isinstance(rows, list):
        raise UserError(f"{uri}: the label table has no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{uri}: row {number} of the label table is no object of file name and label, but {row!r:.80}"
            )
    columns = list(dict.fromkeys(column for row in rows for column in row))  # JSON leaves out what a row has not
    file_column = _column(columns, FILE_COLUMNS, uri, "a file name")
    label_column = _column([c for c in columns if c != file_column], LABEL_COLUMNS, uri, "a label")
    for number, row in enumerate(rows, 1):
        if row.get(file_column) in (None, ""):
            raise UserError(
                f"{uri}: row {number} of the label table has no {file_column}; give it one or remove the row"
            )
    values = [row.get(label_column) for row in rows]
    plural = label_column.lower() in ("labels", "classes")
    multilabel = any(isinstance(v, list) or (plural and isinstance(v, str) and SEPARATORS.search(v)) for v in values)
    table: dict[str, list[str]] = {}
    for row, value in zip(rows, values, strict=True):
        labels = _names(value, multilabel)
        if labels is not None:
            known = table.setdefault(str(row[file_column]).removeprefix("./"), labels)
            if known is not labels and known != labels:
                multilabel = True
                known.extend(label for label in labels if label not in known)
    return table, multilabel


def _column(columns: Iterable[str], known: Sequence[str], uri: str, what: str) -> str:
    lower = {str(column).lower(): column for column in columns}
    for name in known:
        if name in lower:
            return lower[name]
    found = ", ".join(map(str, columns))
    raise UserError(
        f"{uri}: no column with {what} among: {found}{nearest(next(iter(lower), ''), known)}; name it one of {', '.join(known)}"
    )


def _names(value: Any, multilabel: bool) -> list[str] | None:
    """A raw label (int, text, list, missing) as names."""
    if value is None or (value == "" and not multilabel):
        return None
    if isinstance(value, (list, tuple, np.ndarray)):
        return [str(v) for v in value]
    if multilabel and isinstance(value, str):
        return [part.strip() for part in SEPARATORS.split(value) if part.strip()]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return [str(value).strip()]


def _imagenet_devkit(uri: str) -> dict[str, list[str]]:
    """Validation labels of ILSVRC2012_devkit_t12.tar.gz as {file name: [WordNet id]}."""
    import scipy.io

    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri))) as archive:
        files = {os.path.basename(member.name): member for member in archive if member.isfile()}
        try:
            meta = archive.extractfile(files["meta.mat"])
            truth = archive.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
        except KeyError as error:
            raise UserError(f"{uri}: not ImageNet's devkit, {error} is missing") from error
        assert meta is not None
        assert truth is not None
        synsets = scipy.io.loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        wordnet = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        ids = truth.read().split()
    return {f"ILSVRC2012_val_{i:08d}.JPEG": [wordnet[int(label)]] for i, label in enumerate(ids, 1)}


def _lookup(table: dict[str, list[str]], path: str) -> list[str] | None:
    """A file's labels by relative path, base name, or either without extension."""
    base = path.rpartition("/")[2]
    for name in (path, base, os.path.splitext(path)[0], os.path.splitext(base)[0]):
        if name in table:
            return table[name]
    return None


# ---------------------------------------------------------------- looking through a source


def discover(
    uris: Sequence[str],
    *,
    format: Format = "auto",
    labels: str | None = None,
    include: str | None = None,
    need_names: bool = True,
    unit_bytes: int = 1 << 30,
    run: Callable[[Callable, list], Iterable] = map,
) -> list[Source]:
    """Looks through the sources: what kind, which pieces, which label names.

    `labels` is a label table for all of them, `include` a glob over keys. Archives are opened only when their label names are
    needed (`need_names`) or when they are larger than `unit_bytes` and can be cut; `run(function, arguments)` does that,
    in parallel where the caller has the means. Raises UserError: missing, empty, unreadable, ambiguous.
    """
    uris = [storage.normalise(uri) for uri in uris]
    bases = [os.path.splitext(uri.rpartition("/")[2])[0] for uri in uris]
    table, multilabel = read_label_table(labels) if labels else ({}, False)
    sources = []
    for i, uri in enumerate(uris):
        prefix = "" if len(uris) == 1 else bases[i] + (f"-{i}" if bases.count(bases[i]) > 1 else "") + "/"
        files = _list(uri)
        if not files.num_rows:
            raise UserError(f"{uri}: no such file or folder, or nothing in it")
        kind = _kind(uri, files) if format == "auto" else format
        if kind == "folder":
            sources.append(_folder(uri, prefix, files, table, multilabel, include))
        else:
            source = _archives(uri, prefix, kind, files, table, multilabel, need_names, unit_bytes, run)
            if not need_names and kind in ("tar", "tfrecord"):  # nothing was read yet: a few samples tell
                some = itertools.islice(read(source, source.pieces.slice(0, 1)), 256)
                several = any(item.labels is not None and len(item.labels) > 1 for item in some)
                source = replace(source, multilabel=source.multilabel or several)
            sources.append(source)
    return sources


def _list(uri: str) -> pa.Table:
    """(path, size) of every file under a folder, sorted by path; a single file has path ""."""
    files: Iterator[tuple[str, int]]
    if not storage.is_remote(uri):
        if os.path.isfile(uri):
            return _listing([("", os.path.getsize(uri))])
        files = _walk(uri, "")
    else:
        files = ((file.path, file.size) for file in storage.iter_files(uri))
    parts = iter(lambda: list(itertools.islice(files, SPILL_ROWS)), [])
    found = in_order(spilled((_tidied(_listing(part)) for part in parts), LISTING))
    if not found.num_rows and storage.is_remote(uri) and storage.exists(uri):
        fs, path = storage.filesystem(uri)
        return _listing([("", int(fs.size(path)))])
    return found


def _tidied(files: pa.Table) -> pa.Table:
    return files.filter(pc.invert(pc.match_substring_regex(files["path"], LITTER)))


def _listing(files: Sequence[tuple[str, int]]) -> pa.Table:
    paths, sizes = zip(*files, strict=True) if files else ((), ())
    return pa.table([pa.array(paths, pa.large_string()), pa.array(sizes, pa.int64())], schema=LISTING)


def spilled(parts: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """The parts as one table: in memory when there is only one, else in an unnamed file that is mapped, so that the memory of
    the process does not grow with the corpus."""
    parts = iter(parts)
    first = list(itertools.islice(parts, 2))
    if len(first) < 2:
        return first[0] if first else schema.empty_table()
    with tempfile.NamedTemporaryFile(prefix="listing-") as file:
        with pa.ipc.new_file(file.name, schema) as writer:
            for part in itertools.chain(first, parts):
                writer.write_table(part)
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def in_order(files: pa.Table) -> pa.Table:
    """A listing sorted by path."""
    if files.num_rows <= SPILL_ROWS:
        return files.sort_by("path")
    places = np.linspace(0, files.num_rows - 1, SPILL_ROWS).astype(np.int64).tolist()
    some = sorted(files["path"][place].as_py() for place in places)  # `take` would copy the whole column
    bounds = np.array(some, object)[np.linspace(0, SPILL_ROWS - 1, _heaps(files) + 1).astype(np.int64)[1:-1]]
    return _dealt(files, lambda part: np.searchsorted(bounds, part["path"].to_numpy(), "right"), in_order)


def shuffled(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    """The rows in an order in which every order is as likely."""
    if table.num_rows <= SPILL_ROWS:
        return table.take(pa.array(rng.permutation(table.num_rows)))
    heaps = _heaps(table)
    return _dealt(table, lambda part: rng.integers(heaps, size=part.num_rows), lambda heap: shuffled(heap, rng))


def _heaps(table: pa.Table) -> int:
    """As many as leave each about half of SPILL_ROWS; no more than files that may be open."""
    return min(256, 1 + 2 * table.num_rows // SPILL_ROWS)


def _dealt(table: pa.Table, home: Callable[[pa.Table], np.ndarray], settle: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """Deals the rows into heaps, `home` giving the number of each row's, and joins what `settle` makes of every heap. Heaps
    are files, so that memory holds a part of one."""
    with tempfile.TemporaryDirectory(prefix="listing-") as folder, contextlib.ExitStack() as stack:
        names = [f"{folder}/{i}" for i in range(_heaps(table))]
        writers = [stack.enter_context(pa.ipc.new_file(name, table.schema)) for name in names]
        for first in range(0, table.num_rows, SPILL_ROWS):
            part = table.slice(first, SPILL_ROWS).combine_chunks()
            homes = home(part)
            for i in np.unique(homes).tolist():
                writers[i].write_table(part.filter(pa.array(homes == i)))
        for writer in writers:
            writer.close()
        heaps = (settle(pa.ipc.open_file(pa.memory_map(name)).read_all()) for name in names)
        return spilled(heaps, table.schema)


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int]]:
    """Files below a local folder. os.scandir, because fsspec's listing costs ten times as much per file.

    Links are followed, except to a folder `above` (device, inode): there they would lead in circles.
    """
    try:
        here = os.stat(folder)
        above = (*above, (here.st_dev, here.st_ino))
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError as error:
        raise UserError(f"{folder}: permission denied") from error
    with entries:
        for entry in entries:
            if entry.is_dir():
                target = entry.stat()
                if (target.st_dev, target.st_ino) not in above:
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", above)
            else:
                # a name that is not valid UTF-8, or a link to nowhere, becomes a reject when it is read
                size = entry.stat().st_size if os.path.exists(entry.path) else 0
                yield os.fsencode(f"{prefix}{entry.name}").decode("utf-8", "backslashreplace"), size


def _kind(uri: str, files: pa.Table) -> Kind:
    """By the names of (at most a thousand of) the files; images win over archives that lie beside them."""
    names = [path or uri for path in files["path"][:1000].to_pylist()]
    if all(CIFAR.search(name) for name in names):
        return "cifar"
    counts = {
        "folder": sum(name.lower().endswith(tuple(f".{end}" for end in IMAGE_NAMES)) for name in names),
        "tar": sum(bool(TAR.search(name)) for name in names),
        "parquet": sum(name.endswith(".parquet") for name in names),
        "tfrecord": sum(bool(TFRECORD.search(name)) for name in names),
    }
    kind: Any = max(counts, key=lambda k: counts[k])
    if len(names) == 1 and not files["path"][0].as_py() and not any(counts[k] for k in ("tar", "parquet", "tfrecord")):
        raise UserError(
            f"{uri}: a single file that is not a tar, Parquet or TFRecord file; give a folder or an archive"
        )
    return kind if counts[kind] else "folder"


def _folder(
    uri: str, prefix: str, files: pa.Table, table: dict[str, list[str]], multilabel: bool, include: str | None
) -> Source:
    if not table:
        tables = pc.match_substring_regex(files["path"], rf"(?i)^(?:{'|'.join(LABEL_TABLES)})\.[a-z]+$")
        beside = files.filter(tables)["path"].to_pylist()
        beside = [p for p in beside if p.endswith((".csv", ".tsv", ".jsonl", ".parquet"))]
        if beside:
            table, multilabel = read_label_table(storage.join(uri, beside[0]))
            files = files.filter(pc.invert(pc.is_in(files["path"], pa.array(beside, pa.large_string()))))
    if include:
        files = files.filter(pa.array([fnmatch.fnmatch(prefix + path.as_py(), include) for path in files["path"]]))
        if not files.num_rows:
            raise UserError(f"{uri}: nothing matches --include {include!r}")
    if table:
        paths = files["path"].to_pylist()
        labels = [_lookup(table, path) for path in paths]
        missing = set(table) - {p for path in paths for p in (path, path.rpartition("/")[2])}
        stems = {os.path.splitext(p)[0] for path in paths for p in (path, path.rpartition("/")[2])}
        absent = sorted(missing - stems)
        extra = {"path": absent, "size": [0] * len(absent)}
        files = pa.concat_tables([files, pa.table(extra, schema=files.schema)])
        labels += [table[name] for name in absent]
        names = {name for label in labels if label for name in label}
        pieces = _pieces(files, pa.array(labels, PIECES.field("labels").type))
    else:
        folders: set[str] = set()
        names = set()
        deep = False

        def labelled(part: pa.Table) -> pa.Table:
            nonlocal deep
            folder = pc.struct_field(pc.extract_regex(part["path"], r"(?s)^(?P<folder>[^/]*)/"), "folder")
            wordnet = pc.struct_field(pc.extract_regex(part["path"], r"(?s)^(?P<id>n\d{8})(?:[^0-9].*)?$"), "id")
            label = pc.coalesce(folder, wordnet).cast(pa.string()).combine_chunks()
            folders.update(pc.unique(folder).drop_null().to_pylist())
            names.update(pc.unique(label).drop_null().to_pylist())
            deep |= bool(pc.any(pc.greater(pc.count_substring(part["path"], "/"), 1)).as_py())
            offsets = np.cumsum(np.append(0, label.is_valid())).astype(np.int32)
            return _pieces(part, pa.ListArray.from_arrays(pa.array(offsets), label.drop_null(), mask=label.is_null()))

        parts = (files.slice(first, SPILL_ROWS) for first in range(0, files.num_rows, SPILL_ROWS))
        pieces = spilled(map(labelled, parts), PIECES)
        if folders and {f.lower() for f in folders} <= SPLIT_FOLDERS and deep:
            choice = ", ".join(sorted(folders))
            raise UserError(
                f"{uri}: its folders ({choice}) are splits, not classes; name one: --source {uri}/{min(folders)}"
            )
    return Source(
        uri=uri,
        kind="folder",
        prefix=prefix,
        pieces=pieces,
        names=frozenset(names),
        multilabel=multilabel,
        by_folder=not table,
    )


def _pieces(files: pa.Table, labels: pa.Array) -> pa.Table:
    """Whole files as pieces."""
    numbers = [pa.array(np.full(files.num_rows, value, np.int64)) for value in (0, -1)]
    return pa.table([files["path"], files["size"], *numbers, labels], schema=PIECES)


def _path_label(path: str) -> list[str] | None:
    """The class that a path in an archive names: the WordNet id its file name begins with, else its last folder."""
    folders, _, base = path.rpartition("/")
    wordnet = WORDNET.match(base)
    if wordnet:
        return [wordnet[1]]
    return [folders.rpartition("/")[2]] if folders else None


def _archives(
    uri: str,
    prefix: str,
    kind: Kind,
    files: pa.Table,
    table: dict[str, list[str]],
    multilabel: bool,
    need_names: bool,
    unit_bytes: int,
    run: Callable[[Callable, list], Iterable],
) -> Source:
    patterns = {"tar": TAR, "parquet": re.compile(r"\.parquet$"), "tfrecord": TFRECORD, "cifar": TAR}
    if files["path"][0].as_py():  # a folder: other files beside the archives (indices, read-me) are not inputs
        files = files.filter(pa.array([bool(patterns[kind].search(path)) for path in files["path"].to_pylist()]))
    if not files.num_rows:
        raise UserError(f"{uri}: no {kind} files in it")
    jobs = []
    for path, size in zip(files["path"].to_pylist(), files["size"].to_pylist(), strict=True):
        names_too = need_names and not table
        look = kind in ("parquet", "cifar") or names_too or (size > 2 * unit_bytes and not path.endswith(("gz", "tgz")))
        jobs.append((kind, storage.join(uri, path) if path else uri, path, size, unit_bytes, look, names_too))
    found = list(run(_look, jobs))
    rows = [row for look in found for row in look["pieces"]]
    columns = list(zip(*rows, strict=True))
    pieces = pa.table([pa.array(c, f.type) for c, f in zip(columns, PIECES, strict=True)], schema=PIECES)
    names = {name for look in found for name in look["names"]} | {n for labels in table.values() for n in labels}
    ordered = {tuple(look["ordered"]) for look in found if look["ordered"]}
    begins = [names for look in found for names in look.get("begins", ()) if names]
    return Source(
        uri=uri,
        kind=kind,
        prefix=prefix,
        pieces=pieces,
        names=frozenset(names) if names or need_names else None,
        ordered_names=ordered.pop() if len(ordered) == 1 else None,
        multilabel=multilabel or any(look["multilabel"] for look in found),
        table=table,
        by_archive=len(set(begins)) < len(begins),
        problem=next((look["problem"] for look in found if look.get("problem")), ""),
    )


def _look(job: tuple[Kind, str, str, int, int, bool, bool]) -> dict[str, Any]:
    """What one archive holds: pieces of about `unit_bytes`, label names, their order where the file states it."""
    kind, uri, path, size, unit_bytes, look, names_too = job
    whole = {"pieces": [(path, size, 0, -1, None)], "names": [], "ordered": [], "multilabel": False}
    if kind == "parquet":
        return _look_parquet(uri, path, unit_bytes, names_too)
    if kind == "cifar":
        try:
            names = cifar.class_names(_cifar_members(uri))
        except (tarfile.TarError, EOFError, ValueError, OSError, zlib.error) as error:
            raise UserError(f"{uri}: not an archive of CIFAR, or damaged ({error}); fetch it again") from error
        return whole | {"names": names, "ordered": names}
    if kind == "tar":
        begin = _begin(uri)
        if look or any(name.lower().endswith(".tar") for name in begin):
            return whole | {"begins": [begin]} | _look_tar(uri, path, size, unit_bytes, names_too)
        return whole | {"begins": [begin]}
    if not look:
        return whole
    names_found: set[str] = set()
    many, problem = False, ""
    for item in _read_tfrecord(uri, path, {}):
        names_found.update(item.labels or ())
        many |= item.labels is not None and len(item.labels) > 1
        problem = problem or (item.refused.detail if item.refused else "")
    return whole | {"names": sorted(names_found), "multilabel": many, "problem": problem}


# ---------------------------------------------------------------- reading


def read(source: Source, pieces: pa.Table, include: str | None = None) -> Iterator[Item]:
    """The items of some pieces, in order. Never raises for a bad input: that becomes an Item with `refused`."""
    if source.kind == "folder":
        yield from _read_files(source, pieces)
        return
    for piece in pieces.to_pylist():
        uri = storage.join(source.uri, piece["path"]) if piece["path"] else source.uri
        name = piece["path"] or source.uri.rpartition("/")[2]
        if source.kind == "tar":
            items = _read_tar(uri, name, piece["start"], piece["stop"], piece["labels"], source.table)
        elif source.kind == "parquet":
            items = _read_parquet(uri, name, piece["start"], piece["stop"], source.table)
        elif source.kind == "cifar":
            items = _read_cifar(uri, name)
        else:
            items = _read_tfrecord(uri, name, source.table)
        prefix = source.prefix
        if source.by_archive:
            prefix += f"{piece['labels'][0] if piece['labels'] else re.sub(TAR, '', name)}/"
        for item in items:
            key = prefix + item.key
            if include is None or fnmatch.fnmatch(key, include):
                yield item._replace(key=key)


def _read_files(source: Source, pieces: pa.Table) -> Iterator[Item]:
    read = _fetch if storage.is_remote(source.uri) else _load
    for first in range(0, pieces.num_rows, SPILL_ROWS):
        rows = pieces.slice(first, SPILL_ROWS).to_pylist()
        contents = read(source.uri, [row["path"] for row in rows if row["size"] <= MAX_FILE_BYTES])
        for row in rows:
            path, names = row["path"], row["labels"]
            key, where = source.prefix + path, storage.join(source.uri, path)
            if row["size"] > MAX_FILE_BYTES:
                yield Item(key, where, b"", names, _too_large(row["size"]))
                continue
            data = next(contents)
            if isinstance(data, bytes):
                yield Item(key, where, data, names)
            elif isinstance(data, FileNotFoundError):
                yield Item(key, where, b"", names, Refused("missing file"))
            else:
                yield Item(key, where, b"", names, Refused("unreadable", str(data)))


def _too_large(size: int) -> Refused:
    return Refused("too many bytes", f"{size:,}, the limit is {MAX_FILE_BYTES:,}")


def _load(folder: str, paths: list[str]) -> Iterator[bytes | Exception]:
    for path in paths:
        try:
            if os.path.isabs(path) or ".." in path.split("/"):  # from a label table
                raise FileNotFoundError(f"{path} lies outside the source")
            name = os.path.join(folder, path)
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise OSError("not a regular file")  # a pipe or a device would be read for ever
            with open(name, "rb") as file:
                yield file.read()
        except (OSError, ValueError) as error:  # ValueError: a NUL in a name from a label table
            yield error


def _fetch(folder: str, paths: list[str]) -> Iterator[bytes | Exception]:
    """Objects from S3, 64 requests at a time. What is not there is an input's fault and is returned; a store that fails
    is not, and after five attempts is a UserError: images must not turn into rejects because a server was busy."""
    fs, root = storage.filesystem(folder)
    for i in range(0, len(paths), 64):
        data: dict[str, Any] = {}
        wanted = [f"{root}/{path}" for path in paths[i : i + 64]]
        for attempt in range(5):
            missing = [path for path in wanted if not isinstance(data.get(path), (bytes, FileNotFoundError))]
            if missing:
                time.sleep(attempt)
                data |= zip(missing, fsspec.asyn.sync(fs.loop, _gather, fs, missing), strict=True)
        for path in wanted:
            if not isinstance(data[path], (bytes, FileNotFoundError)):
                raise UserError(f"s3://{path}: cannot be read after five attempts ({data[path]})")
            yield data[path]


async def _gather(fs: Any, paths: list[str]) -> list[Any]:
    """Contents or exceptions. One by one, because fsspec's `cat` of a list takes * ? and [ in a name for a pattern."""
    return await asyncio.gather(*map(fs._cat_file, paths), return_exceptions=True)


# ------------------------------------------------ tar


def _members(file: IO[bytes], stream: bool, stop: int = -1) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Files and links from the current position to `stop`. A tar that ends early raises tarfile.ReadError."""
    # "r|" never seeks, for gzip; "r:" skips over data. Nothing is ever extracted to disk, so member names are only names.
    with tarfile.open(fileobj=file, mode="r|*" if stream else "r:") as archive:
        for member in archive:
            if 0 <= stop <= member.offset:
                return
            member.name = member.name.removeprefix("./")
            if (member.isfile() or member.islnk() or member.issym()) and not re.search(LITTER, member.name):
                yield archive, member
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen


def _look_tar(uri: str, path: str, size: int, unit_bytes: int, names_too: bool) -> dict[str, Any]:
    """Label names of a tar, and cuts at sample boundaries; a tar of tars is cut at its inner archives."""
    names: set[str] = set()
    cuts, inner, multilabel, last, problem = [0], [], False, "", ""
    others = False  # more than inner archives
    begins: list[tuple[str, ...]] = []  # of the inner archives
    own: dict[str, list[str]] = {}  # of the sample at hand: labels by sidecar,
    paths: list[list[str]] = []  # and those that its images' paths would give

    def end_sample() -> None:
        found = next((own[extension] for extension in SIDECARS if extension in own), None)
        for label in paths[:1] if found is None else [found] if paths else []:
            names.update(label)
        own.clear()
        paths.clear()

    try:
        with storage.open_file(uri) as file:
            packed = _packed(file)
            for archive, member in _members(file, packed):
                if not member.isfile():
                    continue
                if member.name.lower().endswith(".tar"):
                    label = os.path.basename(member.name)[:-4]
                    names.add(label)
                    if not packed:
                        begin = member.offset_data
                        inner.append((path, member.size, begin, begin + member.size, [label]))
                        begins.append(_begin(uri, begin))
                    continue
                others = True
                stem, extension = _split_name(member.name)
                if stem != last:
                    end_sample()
                    if member.offset - cuts[-1] >= unit_bytes and not packed:
                        cuts.append(member.offset)
                last = stem
                if names_too and extension in SIDECARS:
                    handle = archive.extractfile(member)
                    found, many = _sidecar(extension, handle.read(1 << 20) if handle else b"")
                    multilabel |= many
                    if found is not None:
                        own[extension] = found
                elif _is_image(extension):
                    paths.append(_path_label(member.name) or [])
        end_sample()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        # A damaged archive is still read as far as it goes; reading it again records why it stops there.
        end_sample()
        problem = f"{uri}: the archive breaks off: {error}"
    if inner and not others:
        return {"pieces": inner, "names": sorted(names), "begins": begins, "problem": problem}
    ends = [*cuts[1:], -1]
    pieces = [(path, (b if b > 0 else size) - a, a, b, None) for a, b in zip(cuts, ends, strict=True)]
    return {"pieces": pieces, "names": sorted(names), "multilabel": multilabel, "problem": problem}


def _begin(uri: str, start: int = 0) -> tuple[str, ...]:
    """The first eight names in a tar that begins at byte `start`: two archives that agree in them number their samples
    each for itself, and are not two halves of one numbering with a duplicate."""
    with storage.open_file(uri) as file:
        packed = _packed(file)
        file.seek(start)
        try:
            return tuple(member.name for _, member in itertools.islice(_members(file, packed), 8))
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            return (str(error), uri)  # damaged in its first files: reading it will tell


def _packed(file: IO[bytes]) -> bool:
    """Whether an open archive is compressed, whatever its name says."""
    head = file.read(2)
    file.seek(0)
    return head == b"\x1f\x8b"


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _is_image(extension: str) -> bool:
    """`extension` in WebDataset's sense: jpg, or seg.png."""
    return extension.rpartition(".")[2] in IMAGE_NAMES


def _sidecar(extension: str, data: bytes) -> tuple[list[str] | None, bool]:
    """(label names, multi-label) of a .cls, .txt or .json member."""
    try:
        text = data.decode().strip()
        if extension != "json":
            return ([text] if text else None), False
        value = json.loads(text)
    except ValueError:
        return None, False
    if isinstance(value, dict):
        lower = {str(key).lower(): item for key, item in value.items()}
        value = next((lower[column] for column in LABEL_COLUMNS if column in lower), None)
    many = isinstance(value, list)
    return _names(value, many), many


def _read_tar(
    uri: str, name: str, start: int, stop: int, labels: list[str] | None, table: dict[str, list[str]]
) -> Iterator[Item]:
    try:
        with storage.open_file(uri) as file:
            packed = _packed(file)
            if start:
                file.seek(start)
            yield from _read_members(file, packed, stop, name, labels, table)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield Item(f"{name}@{start}", uri, b"", None, Refused("unreadable", f"the archive breaks off: {error}"))


def _read_members(
    file: IO[bytes], stream: bool, stop: int, name: str, labels: list[str] | None, table: dict[str, list[str]]
) -> Iterator[Item]:
    """Samples of neighbouring members that share a stem (WebDataset): one image, and perhaps a label beside it. Images
    that share a stem without a label beside them (a.1.jpg and a.2.jpg, a.jpg and a.png) are inputs of their own."""

    def items(parts: dict[str, tuple[str, bytes]]) -> Iterator[Item]:
        rest = [extension for extension in parts if extension not in SIDECARS]
        beside = (_sidecar(e, parts[e][1])[0] for e in SIDECARS if e in parts)
        own = next((names for names in beside if names is not None), None)
        if not rest:
            member = next(iter(parts.values()))[0]
            yield Item(member, f"{name}/{member}", b"", own, Refused("not an image"))
            return
        pictures = [e for e in rest if e in IMAGE_NAMES] or [e for e in rest if _is_image(e)] or rest
        for extension in pictures[:1] if len(rest) < len(parts) else pictures:
            member, data = parts[extension]
            if table:
                found = _lookup(table, member)
            else:  # an empty list is a label too, of a sample that has none of the classes
                found = own if own is not None else labels or _path_label(member)
            yield Item(member, f"{name}/{member}", data, found)

    parts: dict[str, tuple[str, bytes]] = {}
    current = ""
    for archive, member in _members(file, stream, stop):
        if not member.isfile():
            detail = f"to {member.linkname}: pack what it points to (tar --dereference --hard-dereference)"
            yield Item(member.name, f"{name}/{member.name}", b"", None, Refused("link", detail))
            continue
        if member.size > MAX_FILE_BYTES:
            yield Item(member.name, f"{name}/{member.name}", b"", None, _too_large(member.size))
            continue
        handle = archive.extractfile(member)
        data = handle.read() if handle else b""
        stem, extension = _split_name(member.name)
        if parts and (stem != current or extension in parts):
            yield from items(parts)
            parts = {}
        current = stem
        if extension == "tar":
            yield from _read_members(io.BytesIO(data), False, -1, name, [os.path.basename(stem)], table)
        else:
            parts[extension] = (member.name, data)
    if parts:
        yield from items(parts)


# ------------------------------------------------ Parquet


def _image_column(file_schema: pa.Schema, uri: str) -> str:
    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))

    candidates = [f.name for f in file_schema if holds_bytes(f.type)]
    for name in (*IMAGE_COLUMNS, *candidates):
        if name in candidates:
            return name
    found = ", ".join(f"{f.name}: {f.type}" for f in file_schema)
    raise UserError(f"{uri}: no column of image bytes (binary, or a struct with bytes) among {found}")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _label_column(file_schema: pa.Schema, image: str) -> str | None:
    lower = {name.lower(): name for name in file_schema.names if name != image}
    return next((lower[name] for name in LABEL_COLUMNS if name in lower), None)


def _look_parquet(uri: str, path: str, unit_bytes: int, names_too: bool) -> dict[str, Any]:
    with _parquet(uri) as file:
        metadata, file_schema = file.metadata, file.schema_arrow
        label = _label_column(file_schema, _image_column(file_schema, uri))
        pieces, first, size = [], 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= unit_bytes or group == metadata.num_row_groups - 1:
                pieces.append((path, size, first, group + 1, None))
                first, size = group + 1, 0
        names: set[str] = set()
        ordered = _huggingface_names(file_schema, label)
        many = label is not None and _is_list(file_schema.field(label).type)
        if names_too and label and not ordered:
            for batch in file.iter_batches(columns=[label], batch_size=1 << 16):
                values = batch.column(0).flatten() if many else batch.column(0)
                if pa.types.is_string_view(values.type):  # Arrow has no `unique` for it
                    values = values.cast(pa.large_string())
                names.update(name for v in values.unique().to_pylist() for name in _names(v, False) or ())
    return {"pieces": pieces, "names": sorted(names) or ordered, "ordered": ordered, "multilabel": many}


def _huggingface_names(file_schema: pa.Schema, label: str | None) -> list[str]:
    """Class names in index order, where the Hugging Face metadata has them."""
    try:
        feature = json.loads(file_schema.metadata[b"huggingface"])["info"]["features"][label]
        if isinstance(feature, list):  # multi-label; newer: a feature of type List or Sequence
            feature = feature[0]
        return list(feature["feature"]["names"] if "feature" in feature else feature["names"])
    except (KeyError, TypeError, ValueError, IndexError):
        return []


class _Fetched:
    """A file on a store that remembers whether reading it failed: Arrow makes the same exceptions of that and of damage."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle = handle
        self.problem: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self.handle.read(size)
        except Exception as error:  # botocore, aiohttp and the socket layer each have their own
            self.problem = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)


class _parquet:
    """An open Parquet file. A local one goes to Arrow by path: a Python file object behind its I/O threads costs speed.

    Raises StorageError when the store fails, UserError for what is no Parquet file.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> pq.ParquetFile:
        self.handle: Any = None
        try:
            if storage.is_remote(self.uri):
                fs, path = storage.filesystem(self.uri)
                self.handle = _Fetched(fs.open(path, "rb", block_size=16 << 20))
                return pq.ParquetFile(self.handle, pre_buffer=False)
            self.handle = pa.memory_map(self.uri)
            return pq.ParquetFile(self.handle)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            self.check()
            raise UserError(f"{self.uri}: not a Parquet file, or damaged ({error})") from error
        except Exception:
            self.check()
            raise

    def check(self) -> None:
        problem = getattr(self.handle, "problem", None)
        if problem is not None:
            raise storage.StorageError(
                f"{self.uri}: cannot be read ({problem}); run the same command again"
            ) from problem

    def __exit__(self, *_: object) -> None:
        self.handle.close()
        self.check()


def _read_parquet(uri: str, name: str, start: int, stop: int, table: dict[str, list[str]]) -> Iterator[Item]:
    opened = _parquet(uri)
    with opened as file:
        file_schema = file.schema_arrow
        image = _image_column(file_schema, uri)
        label = _label_column(file_schema, image)
        lower = {n.lower(): n for n in file_schema.names if n != image and _is_text(file_schema.field(n).type)}
        # "name" is as often that of the class
        key = next((lower[n] for n in FILE_COLUMNS if n in lower and lower[n] != label and n != "name"), None)
        columns = list(dict.fromkeys(c for c in (key, image, label) if c))
        stop = file.num_row_groups if stop < 0 else stop
        row = sum(file.metadata.row_group(g).num_rows for g in range(start))
        try:
            for batch in file.iter_batches(
                batch_size=64, row_groups=range(start, stop), columns=columns, use_threads=False
            ):
                for values in batch.to_pylist():
                    data, where = values[image], f"{name}#{row}"
                    own = values[key] if key else None
                    key_text = f"{name}/{own}" if own else where
                    if isinstance(data, dict):
                        if not own and data.get("path"):  # Hugging Face drops the folders: other rows may have the same
                            own = data["path"]
                            key_text = f"{where}/{own}"
                        data = data.get("bytes")
                    row += 1
                    labels = _lookup(table, own) if table and own else _names(values[label], False) if label else None
                    if data is None:
                        yield Item(key_text, where, b"", labels, Refused("empty", "no bytes in the row"))
                    else:
                        yield Item(key_text, where, data, labels)
        except (pa.ArrowException, OSError) as error:
            opened.check()
            yield Item(f"{name}#{row}", uri, b"", None, Refused("unreadable", f"the file breaks off: {error}"))


# ------------------------------------------------ TFRecord, CIFAR


def _read_tfrecord(uri: str, name: str, table: dict[str, list[str]]) -> Iterator[Item]:
    row = 0
    try:
        for record in _records(uri):
            where = f"{name}#{row}"
            row += 1
            try:
                example = tfrecord.parse_example(record)
            except UserError as error:
                yield Item(where, where, b"", None, Refused("corrupt", str(error)))
                continue
            image = _first(example, "image/encoded", "image", "image_raw", "jpg", "jpeg")
            own = _first(example, "image/filename", "filename", "file_name", "image/key/sha256", "key")
            own = own.decode("utf-8", "backslashreplace") if isinstance(own, bytes) else None
            names = _lookup(table, own) if table and own else _class_names(example)
            key = f"{name}/{own}" if own else where
            if not isinstance(image, bytes):
                yield Item(key, where, b"", names, Refused("not an image", "no image bytes in the example"))
            else:
                yield Item(key, where, image, names)
    except (ValueError, EOFError, OSError) as error:
        yield Item(f"{name}#{row}", uri, b"", None, Refused("unreadable", f"the file breaks off: {error}"))


def _records(uri: str) -> Iterator[bytes]:
    with storage.open_file(uri) as file:
        try:
            yield from tfrecord.read_records(file, uri)
        except UserError as error:  # a damaged file, unlike the errors of a store that fails
            raise ValueError(str(error)) from error


def _class_names(example: dict[str, Any]) -> list[str] | None:
    """The labels of an example, several when it is multi-label; names where it has them, else numbers."""
    for feature in (
        "image/class/synset",
        "image/class/text",
        "class",
        "label_name",
        "image/class/label",
        "label",
        "labels",
    ):
        values = example.get(feature)
        if values is not None and len(values):
            return [
                value.decode("utf-8", "replace") if isinstance(value, bytes) else str(int(value)) for value in values
            ]
    return None


def _first(example: dict[str, Any], *names: str) -> Any:
    for name in names:
        values = example.get(name)
        if values is not None and len(values):
            return values[0]
    return None


def _cifar_members(uri: str) -> Iterator[tuple[str, bytes]]:
    with storage.open_file(uri) as file:
        for archive, member in _members(file, stream=True):
            handle = archive.extractfile(member) if member.isfile() else None
            yield os.path.basename(member.name), handle.read(MAX_FILE_BYTES) if handle else b""


def _read_cifar(uri: str, name: str) -> Iterator[Item]:
    try:
        for member, data in _cifar_members(uri):
            part, where = member.removesuffix(".bin"), f"{name}/{member}"
            if part not in cifar.PARTS:
                continue
            try:
                pixels_NHWC, labels, left_over = cifar.parse(member, data)
            except ValueError as error:
                yield Item(part, where, b"", None, Refused("corrupt", str(error)))
                continue
            if left_over:
                yield Item(
                    part, where, b"", None, Refused("truncated", f"{left_over} bytes after the last whole record")
                )
            for i, (pixels, label) in enumerate(zip(pixels_NHWC, labels, strict=True)):
                yield Item(f"{part}/{i:05d}", where, np.ascontiguousarray(pixels), [str(label)])
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield Item(name, uri, b"", None, Refused("unreadable", f"the archive breaks off: {error}"))


def prefetched(items: Iterable[Item], depth: int = 64) -> Iterator[Item]:
    """The same items, read by a thread while the caller works. For storage that makes one wait."""
    import queue

    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(value: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(value, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()


def _read_text(uri: str) -> str:
    try:
        return storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{uri}: not UTF-8 text ({error})") from error
