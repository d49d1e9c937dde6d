"""Lists of URLs: tables with a column of addresses, whose images are downloaded when they are read. Formats are
Parquet, CSV, TSV, JSON lines, and text with one address per line, with or without gzip, as for img2dataset. The column
of addresses is `url` or another known name (--url-column). Labels and splits come from columns, as in Parquet files of
images. A fragment is a range of rows. The key of an image is FILE#ROW, or FILE/NAME with --file-column.
"""

import base64
import binascii
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline import credentials, storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives, urltables
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.columnar import RowColumns, first_values, huggingface_names, image_column, is_text
from pipeline.data.sources.columns import WHOLE_NUMBER, named_column, normalised_name
from pipeline.data.sources.items import Downloads, Item, ScanOptions, Source, is_included
from pipeline.data.sources.listing import address_of
from pipeline.data.sources.split_columns import split_name
from pipeline.data.sources.urltables import Table, open_table
from pipeline.errors import StorageError, UserError

NAME = "urls"
URL_COLUMNS = (
    "url",
    "image_url",
    "img_url",
    "imageurl",
    "image_link",
    "photo_image_url",
    "original_url",
    "originalurl",
    "urls",
    "uri",
    "link",
    "src",
    "address",
)
HASHES = {"sha256": 32, "sha1": 20, "md5": 16, "sha512": 64}  # name -> bytes
IMAGE_BYTES = 64 << 10  # typical size of a web image, for dividing the work evenly


def matches(path: str) -> bool:
    """Whether a file has the suffix of a table; `is_list` checks the content."""
    return urltables.matches(path)


def is_list(uri: str, paths: Sequence[str], downloads: Downloads) -> bool:
    """Whether the first table of a source contains addresses of images, and no images. Raises UserError for a table
    without access, StorageError for an outage."""
    path = next((path for path in paths if matches(path or uri)), None)
    if path is None:
        return False
    table_uri = address_of(uri, path) if path else uri
    storage.read_bytes(table_uri, 0, 1)  # a file that cannot be read is not one of another format
    try:
        with open_table(table_uri) as table:
            if table.schema.metadata is not None or table.is_parquet:
                try:
                    image_column(table.schema, uri)
                    return False
                except UserError:
                    pass
            column = _url_column(table.schema.names, downloads.url_column)
            return column is not None and any(_is_address(row.get(column)) for row in table.first_rows())
    except StorageError:
        raise
    except UserError:
        return False


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower().startswith(("http://", "https://"))


def _url_column(names: Sequence[str], wanted: str | None) -> str | None:
    return named_column(names, URL_COLUMNS, wanted, "--url-column")


# ---------------------------------------------------------------- columns


@dataclass(frozen=True, slots=True)
class _Columns:
    """The roles of the columns of a list."""

    rows: RowColumns
    text: bool  # whether every cell is text
    url: str
    digest: str | None  # column of hashes of files

    @classmethod
    def of(cls, table: Table, uri: str, path: str, source: ScanOptions | Source, downloads: Downloads) -> "_Columns":
        names = table.schema.names
        try:
            url = _url_column(names, downloads.url_column)
            digest = None
            if downloads.config.hash_column != "none":
                known = [name for name in map(normalised_name, names) if _algorithm(name)]
                digest = named_column(names, known, downloads.config.hash_column, "--download.hash-column")
        except UserError as error:
            raise UserError(f"{uri}: {error}") from error
        if url is None:
            raise UserError(f"{uri}: no column of addresses among {', '.join(names)}; name it with --url-column")
        named = source.columns
        rows = RowColumns(table.schema, uri, path, named, lambda name: first_values(table.columns([name])), image=url)
        return cls(rows, not table.is_parquet, url, digest)

    @property
    def all(self) -> list[str]:
        return list(dict.fromkeys([*self.rows.all, *([self.digest] if self.digest else [])]))

    def labels(self, values: Mapping[str, Any], source: Source) -> list[str] | None:
        """The label names of a row: from a label table, by the row's name or the path
        of its address, otherwise from the row."""
        table = source.naming.table
        if table.labels:
            own = values.get(self.rows.key) if self.rows.key else None
            return table.lookup(str(own or str(values.get(self.url) or "").partition("?")[0]))
        return self.own_labels(values)

    def own_labels(self, values: Mapping[str, Any]) -> list[str] | None:
        """The label names in a row. pandas writes 2 as 2.0 if the column has missing values."""
        labels = self.rows.labels(dict(values))
        if not labels or not self.text:
            return labels
        return [name.partition(".")[0] if WHOLE_NUMBER.fullmatch(name) else name for name in labels]

    def split(self, values: Mapping[str, Any]) -> str | None:
        own = split_name(values.get(self.rows.split), self.rows.split) if self.rows.split else None
        return own or self.rows.split_of_file


def _algorithm(name: str) -> str | None:
    """The hash algorithm of a column with this name, such as sha256, image_md5 or
    OriginalMD5; excludes hashes of addresses."""
    plain = normalised_name(name)
    return next((hash for hash in HASHES if plain.endswith(hash) and "url" not in plain), None)


# ---------------------------------------------------------------- scanning


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    """Scans lists with Ray tasks: fragments of some thousand rows, and the label names."""
    source = archives.scan_archives(NAME, uri, files, options, matches, scan_file)
    return replace(source, names=source.names or frozenset(), downloads=options.downloads, include=options.include)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    with open_table(uri) as table:
        columns = _Columns.of(table, uri, path, options, options.downloads)
        ordered = huggingface_names(table.schema, columns.rows.label)
        found = FileScan(
            fragments=[],
            names=ordered,
            ordered_names=tuple(ordered),
            multilabel=columns.rows.multilabel,
            fields=columns.rows.fields,
        )
        names: set[str] = set(ordered)
        splits = {columns.rows.split_of_file} if columns.rows.split_of_file else set()
        wanted = archives.names_wanted(options) and not ordered
        reading = columns.rows.label_columns if wanted else [columns.rows.split] if columns.rows.split else []
        count = 0
        for span in table.spans():
            found.fragments.append((path, span.rows * IMAGE_BYTES, span.start, span.stop, None))
            found.first_rows.append(span.first)
            count += span.rows
            if reading:
                _add_names(columns, span.values, names, splits, found)
        for batch in table.batches(reading) if reading else ():
            labels, some, many = columns.rows.names_and_splits(batch)
            names.update(labels)
            splits.update(some)
            found.multilabel |= many
        if wanted and not columns.rows.label and columns.rows.label_of_file:
            names = {columns.rows.label_of_file}
        found.names, found.splits, found.stamp = names, splits, table.stamp(columns.url)
        label = columns.rows.label
        if wanted and label and not options.columns.label and is_text(table.schema.field(label).type):
            found.texts, found.text_samples, found.text_column = names, count, label
    return found


def _add_names(
    columns: _Columns, rows: Iterable[Mapping[str, Any]], names: set[str], splits: set[str], found: FileScan
) -> None:
    for values in rows:
        labels = columns.own_labels(values)
        names.update(labels or ())
        found.multilabel |= labels is not None and len(labels) > 1
        if columns.rows.split:
            splits.add(columns.split(values) or "")


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Row:
    item: Item
    address: str
    digest: str | None


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    """The images of the rows, in order. A failed download is an Item with the reason."""
    from pipeline.data.downloads.stream import download  # aiohttp takes 0.3 s to import

    assert source.downloads is not None
    rows = list(_wanted(source, fragments))
    waiting = [row.address for row in rows if row.item.refused is None]
    results = download(waiting, source.downloads.config, allow_private=source.downloads.allow_private)
    try:
        for row in rows:
            if row.item.refused is not None:
                yield row.item
                continue
            result = next(results)
            if isinstance(result, Refused):
                yield row.item._replace(refused=Refused(result.reason, credentials.redacted(result.detail)))
            elif problem := _check_digest(result, row.digest):
                yield row.item._replace(refused=Refused("hash mismatch", problem))
            else:
                yield row.item._replace(image=result)
    finally:
        results.close()  # type: ignore[attr-defined]


def _wanted(source: Source, fragments: pa.Table) -> Iterator[_Row]:
    """The rows whose images are requested."""
    taken, place = 0, -1
    for uri, name, fragment in _joined(source, fragments):
        assert source.downloads is not None
        with open_table(uri) as table:
            columns = _Columns.of(table, uri, fragment["path"], source, source.downloads)
            needed = None if source.downloads.keep_rows else columns.all
            for number, values in table.rows(fragment["start"], fragment["stop"], fragment["row"], needed):
                row = _row(source, columns, name, number, values, fragment)
                if not is_included(row.item.key, source.include):
                    continue
                place += 1
                if source.only is not None and place not in source.only:
                    continue
                if taken == source.limit:
                    return
                taken += 1
                yield row


def _joined(source: Source, fragments: pa.Table) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(URI, name in keys, fragment), with adjacent fragments merged."""
    last: dict[str, Any] | None = None
    for fragment in [*fragments.to_pylist(), None]:
        if last and fragment and (last["path"], last["stop"]) == (fragment["path"], fragment["start"]):
            last["stop"] = fragment["stop"]
            continue
        if last is not None:
            path = last["path"]
            yield address_of(source.uri, path) if path else source.uri, path or source.uri.rpartition("/")[2], last
        last = fragment


def _row(
    source: Source, columns: _Columns, name: str, number: int, values: dict[str, Any], fragment: dict[str, Any]
) -> _Row:
    own = values.get(columns.rows.key) if columns.rows.key else None
    prefix = source.prefix
    if source.by_archive:
        prefix += f"{archives.archive_stem(name)}/"
    key = f"{prefix}{name}/{credentials.redacted(str(own))}" if own else f"{prefix}{name}#{number}"
    address = values.get(columns.url)
    shown = credentials.redacted(address.strip()) if isinstance(address, str) else ""
    labels = columns.labels(values, source)
    if labels is None and fragment["labels"]:
        labels = list(fragment["labels"])
    assert source.downloads is not None
    item = Item(
        key,
        shown or f"{name}#{number}",
        b"",
        labels,
        _refused_before(shown, labels, source.downloads),
        columns.split(values) or fragment["split"],
        _public(values) if source.downloads.keep_rows else None,
    )
    digest = values.get(columns.digest) if columns.digest else None
    algorithm = f"{_algorithm(columns.digest or '') or ''}:{_digest_text(digest)}" if digest else None
    return _Row(item, address if isinstance(address, str) else "", algorithm)


def _refused_before(address: str, labels: list[str] | None, downloads: Downloads) -> Refused | None:
    """The reason for rejecting a row without a download."""
    if not address:
        return Refused("bad address", "the row has no address")
    return Refused("no label") if labels is None and downloads.need_labels else None


def _public(value: Any) -> Any:
    """A value of a row without secrets, at any depth; NaN and infinity, which JSON does not have, become None."""
    if isinstance(value, str):
        return credentials.redacted(value)
    if isinstance(value, bytes):
        return credentials.redacted(value.decode("latin-1")).encode("latin-1")
    if isinstance(value, Mapping):
        return {_public(key): _public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest_text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value).strip()


def _check_digest(data: bytes, expected: str | None) -> str:
    """The mismatch between a file and the hash of its row, given as NAME:TEXT in hex or base64; "" if they match."""
    if expected is None:
        return ""
    algorithm, _, text = expected.partition(":")
    wanted: bytes | None = None
    for decode in (bytes.fromhex, lambda value: base64.b64decode(value, validate=True)):
        try:
            wanted = decode(text)
        except (ValueError, binascii.Error):
            continue
        algorithm = algorithm or next((name for name, size in HASHES.items() if size == len(wanted or b"")), "")
        if algorithm and len(wanted) == HASHES[algorithm]:
            break
        wanted = None
    if wanted is None:
        return f"{text[:80]!r} is not a valid {algorithm or 'hash'}"
    found = hashlib.new(algorithm, data).digest()
    return "" if found == wanted else f"{algorithm} {found.hex()}, expected {wanted.hex()}"
