"""WebDataset samples in tar and zip archives: members with the same stem form a
sample, such as an image and its label."""

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.data import codecs
from pipeline.data.codecs import Refused
from pipeline.data.sources.archives import MAX_IMAGE_KEYS, FileScan
from pipeline.data.sources.columns import Columns, label_names, name_in_object, normalised_name
from pipeline.data.sources.items import Item, Source
from pipeline.data.sources.layout import WORDNET, folders_of, split_in_name
from pipeline.data.sources.listing import IgnoredFiles
from pipeline.data.sources.naming import TABLE_FILE
from pipeline.data.sources.split_columns import split_name, split_of_fields
from pipeline.data.sources.tables import file_hash
from pipeline.data.sources.words import CAPTION_COLUMNS, LABEL_COLUMNS
from pipeline.errors import UserError

SIDECARS = ("cls", "txt", "json")  # extensions of members that may hold the label, in order of preference
NESTED = re.compile(r"(?i)\.(zip|tar|tgz|tbz2?|txz|tzst|gz|bz2|xz|zst|7z|rar)$")
MAX_SIDECAR_BYTES = 1 << 20
MAX_TABLE_BYTES = 1 << 30
MAX_TABLE_RATIO = 16  # of the size of a table to that of its archive


class Sidecar(NamedTuple):
    """The label and the split in the sidecars of an image."""

    labels: list[str] | None = None
    split: str | None = None
    multilabel: bool = False
    from_text: bool = False  # whether the label is the text of a .txt member, which may be a caption
    keys: tuple[str, ...] = ()  # field names of the JSON member


def split_extension(name: str) -> tuple[str, str]:
    """(stem, extension) by WebDataset's rule: the extension begins at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def is_image(extension: str) -> bool:
    """Whether an extension in WebDataset's sense (jpg or seg.png) is that of an image."""
    return extension.rpartition(".")[2] in codecs.extensions()


def read_sidecars(parts: dict[str, bytes], columns: Columns) -> Sidecar:
    """The label and the split of one sample from its sidecars, {extension: data}. Captions are ignored."""
    value = _json(parts["json"]) if "json" in parts else None
    fields = {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}
    plain = {normalised_name(key): item for key, item in reversed(fields.items())}
    captioned = not CAPTION_COLUMNS.isdisjoint(plain)
    split = split_of_fields(fields) if columns.split is None else fields.get(columns.split)
    found: dict[str, list[str] | None] = {}
    many = False
    for extension in ("cls", "txt"):
        if extension in parts and not (captioned and extension == "txt" and columns.label != "txt"):
            text = _text(parts[extension])
            found[extension] = [text] if text else None
    if "json" in parts:
        label = _field(fields, plain, columns.label, LABEL_COLUMNS) if isinstance(value, dict) else value
        label = name_in_object(label)
        many = isinstance(label, list)
        found["json"] = None if isinstance(label, dict) else label_names(label)
    if columns.label in ("cls", "txt"):
        found = {columns.label: found.get(columns.label)}
    elif columns.label is not None:
        found = {"json": found.get("json")}
    extension = next((e for e in SIDECARS if found.get(e) is not None), "")
    return Sidecar(
        labels=found.get(extension),
        split=split_name(split, columns.split or "split") if isinstance(split, str | int) else None,
        multilabel=many and extension == "json",
        from_text=extension == "txt" and columns.label != "txt",
        keys=tuple(fields),
    )


def _field(fields: dict[str, Any], plain: dict[str, Any], wanted: str | None, known: tuple[str, ...]) -> Any:
    if wanted is not None:
        return fields.get(wanted)
    return next((plain[name] for name in known if name in plain), None)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None


# ---------------------------------------------------------------- scanning


@dataclass(kw_only=True, slots=True)
class SampleScanner:
    """Scans the members of one archive and collects labels, folders and tables."""

    columns: Columns
    wanted: Callable[[str], bool]
    """Whether a member may be an input."""
    names: set[str]
    folders: Counter[tuple[str, ...]]
    """Folders of the images without a sidecar label, with the number of images in each folder."""
    wordnet: set[str]
    """WordNet ids at the beginning of the names of those images."""
    splits: set[str]
    tables: list[tuple[str, bytes]]
    splits_in_names: Counter[str | None]
    """The splits that the image file names contain; None for names without one."""
    texts: set[str]
    """Labels from .txt members, which may be captions."""
    text_samples: int = 0
    multilabel: bool = False
    keys: set[str]
    """Field names of JSON members."""
    lone_images: "array[int]"
    """Hashes of the stems of images without sidecars; compared with the stems of sidecars without images."""
    lone_sidecars: dict[str, Sidecar]
    image_keys: "array[int]"
    """`file_hash` of the images."""
    scattered: bool = False
    ignored: IgnoredFiles
    """Hidden and system files among the members."""
    max_table: int = MAX_TABLE_BYTES
    where: str = ""
    nested: str = ""
    """The first archive in the archive."""
    has_images: bool = False
    _stem: str = ""
    _parts: dict[str, bytes]
    _images: list[str]

    @classmethod
    def new(cls, columns: Columns, wanted: Callable[[str], bool], packed: int, where: str) -> "SampleScanner":
        """packed: size of the archive. where: its address, for errors."""
        return cls(
            where=where,
            max_table=min(MAX_TABLE_BYTES, max(16 << 20, MAX_TABLE_RATIO * packed)),
            columns=columns,
            wanted=wanted,
            names=set(),
            folders=Counter(),
            wordnet=set(),
            splits=set(),
            tables=[],
            splits_in_names=Counter(),
            texts=set(),
            keys=set(),
            lone_images=array("q"),
            lone_sidecars={},
            ignored=IgnoredFiles(),
            image_keys=array("Q"),
            _parts={},
            _images=[],
        )

    def starts_sample(self, name: str) -> bool:
        """Whether a member begins another sample. If it does, the previous sample is counted."""
        stem, _ = split_extension(name)
        if stem == self._stem:
            return False
        self.end_sample()
        self._stem = stem
        return True

    def add(self, name: str, size: int, read: Callable[[int], bytes]) -> None:
        """Adds the next member; `read(limit)` returns its first bytes and is called only for tables and sidecars."""
        _, extension = split_extension(name)
        if TABLE_FILE.fullmatch(name):
            if size > self.max_table:
                raise UserError(
                    f"{name} in {self.where} has {size:,} bytes, more than the limit of {self.max_table:,} for a table in an "
                    "archive of this size; unpack it and pass it with --labels"
                )
            self.tables.append((name, read(self.max_table)))
        elif extension in SIDECARS:
            self._parts[extension] = read(MAX_SIDECAR_BYTES)
        elif is_image(extension) and self.wanted(name):
            self._images.append(name)
            self.has_images = True
            self.image_keys.append(file_hash(name))
        elif not self.nested and NESTED.search(name):
            self.nested = name

    def end_sample(self) -> None:
        beside = read_sidecars(self._parts, self.columns)
        if self._images:
            self._count(beside)
            if not self._parts:
                self.lone_images.append(hash(self._stem))
            if beside.labels is None:
                for name in self._images:
                    self.folders[folders_of(name)] += 1
                    if wordnet := WORDNET.match(name.rpartition("/")[2]):
                        self.wordnet.add(wordnet[1])
            for name in self._images:
                self.splits_in_names[split_in_name(name)] += 1
        elif self._parts:
            self.lone_sidecars[self._stem] = beside
        self._parts, self._images = {}, []

    def _count(self, beside: Sidecar) -> None:
        self.keys.update(beside.keys)
        self.names.update(beside.labels or ())
        self.multilabel |= beside.multilabel
        self.splits.add(beside.split or "")
        if beside.from_text:
            self.texts.update(beside.labels or ())
            self.text_samples += 1

    def scan(self, fragments: list[Any], first: list[tuple[str, ...]], problem: str = "") -> FileScan:
        """The result as a FileScan."""
        return FileScan(
            fragments=fragments,
            names=sorted(self.names),
            multilabel=self.multilabel,
            first_members=first,
            problem=problem,
            splits=sorted(self.splits) if any(self.splits) else (),
            folders=dict(self.folders),
            wordnet=sorted(self.wordnet),
            splits_in_names=self.splits_in_names,
            tables=self.tables,
            scattered=self.scattered,
            texts=self.texts,
            text_samples=self.text_samples,
            fields=self.keys,
            image_keys=np.unique(np.array(self.image_keys, np.uint64))[:MAX_IMAGE_KEYS],
            ignored=(self.ignored.count, self.ignored.example),
            nested="" if self.has_images else self.nested,
        )

    def finish(self) -> None:
        """Call after the last member: joins samples whose members are not next to each other."""
        self.end_sample()
        stems = np.unique(np.array([hash(stem) for stem in self.lone_sidecars], np.int64))
        matched = np.isin(np.array(self.lone_images, np.int64), stems)
        self.scattered = bool(matched.any())
        if not self.scattered:
            return
        if matched.all():
            self.folders.clear()
        lone = set(np.array(self.lone_images, np.int64)[matched].tolist())
        for stem, beside in self.lone_sidecars.items():
            if hash(stem) in lone:
                self._count(beside)


# ---------------------------------------------------------------- reading


def items_of_sample(
    parts: dict[str, tuple[str, bytes]],
    name: str,
    labels: list[str] | None,
    source: Source,
    scattered: dict[str, Sidecar] | None = None,
) -> Iterator[Item]:
    """The items of one sample, {extension: (member, data)}, of the archive `name`.

    labels: labels of the archive itself. scattered: sidecars from elsewhere in the archive, by stem. Images that share a
    stem and have no sidecar (a.1.jpg and a.2.jpg, a.jpg and a.png) are separate inputs.
    """
    rest = [extension for extension in parts if extension not in SIDECARS]
    beside = read_sidecars({e: parts[e][1] for e in SIDECARS if e in parts}, source.columns)
    if not rest:
        member = next(iter(parts.values()))[0]
        if scattered is None or split_extension(member)[0] not in scattered:
            yield Item(member, f"{name}/{member}", b"", beside.labels, Refused("not an image"))
        return
    alone = len(rest) == len(parts)
    if scattered and alone:
        beside = scattered.get(split_extension(parts[rest[0]][0])[0], beside)
    pictures = [e for e in rest if e in codecs.extensions()] or [e for e in rest if is_image(e)]
    for extension in pictures[:1] if not alone else pictures or rest:
        member, data = parts[extension]
        if not pictures and TABLE_FILE.fullmatch(member):
            return
        own, split = source.naming.of(member)
        if source.naming.table.labels and not source.naming.table.of_splits:
            found = own
        else:  # an empty list is a valid label: the sample has none of the classes
            found = next((value for value in (beside.labels, labels, own) if value is not None), None)
        yield Item(member, f"{name}/{member}", data, found, split=beside.split or split)
