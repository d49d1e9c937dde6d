"""The manifest of a dataset and its parts: the row schema, shards, and receipts of writers."""

import gc
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.format.constants import VERSION, Encoding
from pipeline.errors import UserError
from pipeline.revision_names import MANIFEST

Label = int | Sequence[int]

_SHARD_NAME = re.compile(r"[\w-][\w.-]*")  # names are joined to the URI of the dataset: no path, no leading dot


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Schema of a row. `image` describes the stored images: {"size", "quality"} for encoding jpeg, and for encoding
    patches {"height", "width", "patch_size", "channels"}. Raises UserError for an unknown encoding or an invalid
    geometry."""

    encoding: Encoding = "jpeg"
    image: dict[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()
    multilabel: bool = False

    def __post_init__(self) -> None:
        if self.encoding not in ("jpeg", "patches"):
            raise UserError(f"encoding {self.encoding!r} is not one of jpeg, patches")
        if self.encoding == "jpeg":
            return
        for name in ("height", "width", "patch_size", "channels"):
            value = self.image.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 16:
                raise UserError(f"image.{name} is {value!r}, but encoding patches needs a number from 1 to {1 << 16}")
        height, width, patch_size = (self.image[name] for name in ("height", "width", "patch_size"))
        if height % patch_size or width % patch_size:
            raise UserError(f"patch size {patch_size} does not divide an image of {height}x{width}")

    @property
    def tokens(self) -> int:
        """Patches per image, N (encoding patches)."""
        return (self.image["height"] // self.image["patch_size"]) * (self.image["width"] // self.image["patch_size"])

    @property
    def token_bytes(self) -> int:
        """Bytes per patch, P*P*C (encoding patches)."""
        return self.image["patch_size"] ** 2 * self.image["channels"]

    @property
    def image_bytes(self) -> int:
        """Bytes of one stored image; 0 when the size varies (encoding jpeg)."""
        return self.tokens * self.token_bytes if self.encoding == "patches" else 0

    def arrow(self) -> pa.Schema:
        """The Arrow schema of a shard, with the versioned schema in its metadata."""
        label = pa.list_(pa.field("element", pa.int32(), nullable=False)) if self.multilabel else pa.int32()
        about = {"version": VERSION, "encoding": self.encoding, "image": self.image, "classes": list(self.classes)}
        return pa.schema(
            [
                pa.field("key", pa.string(), nullable=False),
                pa.field("label", label, nullable=False),
                pa.field("width", pa.int32(), nullable=False),
                pa.field("height", pa.int32(), nullable=False),
                pa.field("image", pa.binary(self.image_bytes or -1), nullable=False),
            ],
            metadata={"vit_pipeline": json.dumps(about, ensure_ascii=False)},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Parquet file. `row_groups` has an entry (rows, start, values, end, checksum) per row group: its byte range
    [start, end) in the file, the offset of its image values, and the checksum of the range."""

    name: str
    rows: int
    bytes: int
    sha256: str
    row_groups: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # asdict would copy all row groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of `manifest.json`. Fields are written in this order, shards last."""

    version: int = VERSION
    encoding: Encoding
    image: dict[str, Any]
    multilabel: bool = False
    revision: int = 1  # 1, then one more for each append or deletion (revisions.py)
    rows: int
    inputs: int  # rows + rejects + duplicates + deleted, checked
    deleted: int = 0  # rows that deletions have removed
    deleted_sha256: str = ""  # of the hashes of their keys (deleted.py)
    duplicates: int = 0  # rows removed as duplicates, within the corpus or of an evaluation set
    duplicates_by_reason: dict[str, int] = field(default_factory=dict)  # exact or near, of the corpus or of which set
    reported_by_reason: dict[str, int] = field(default_factory=dict)  # the same of rows that were only reported
    rejects: dict[str, int] = field(default_factory=dict)  # reason -> count
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]
    std: list[float] | None = None
    fingerprint: str  # hash of the content
    input_fingerprint: str = ""  # hash of the source listing
    config: dict[str, Any] = field(default_factory=dict)  # of revision 1
    history: list[dict[str, Any]] = field(default_factory=list)  # how each later revision was made
    class_counts: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    @property
    def schema(self) -> Schema:
        return Schema(encoding=self.encoding, image=self.image, classes=self.classes, multilabel=self.multilabel)

    def to_json(self) -> str:
        """JSON with one line per field and per shard, which is readable, diffable and compact for 300,000 row
        groups."""

        def line(value: Any) -> str:
            return json.dumps(value, ensure_ascii=False)

        lines = [f"{line(f.name)}: {line(getattr(self, f.name))}" for f in fields(self) if f.name != "shards"]
        shards = ",\n  ".join(line(shard.to_dict()) for shard in self.shards)
        return "{\n " + ",\n ".join([*lines, f'"shards": [\n  {shards}\n ]']) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST) -> "Manifest":
        """Parses a manifest. Raises UserError for another version of the format and for invalid content."""
        import pydantic  # imported late: takes 0.1 s, which --help does not need

        collecting = gc.isenabled()
        gc.disable()  # otherwise garbage collection of 300,000 short lists takes two thirds of the time
        try:
            manifest = pydantic.TypeAdapter(cls).validate_json(text, strict=True)
        except pydantic.ValidationError as error:
            version = _version_of(text)
            if version != VERSION:
                raise UserError(_other_version(where, version)) from error
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "content"
            raise UserError(f"{where}: not a dataset manifest ({place}: {first['msg']})") from error
        finally:
            if collecting:
                gc.enable()
        if manifest.version != VERSION:
            raise UserError(_other_version(where, manifest.version))
        try:
            _check_manifest(manifest)
        except (UserError, ValueError) as error:
            raise UserError(f"{where}: not a dataset manifest ({error})") from error
        return manifest


def content_fingerprint(shards: Sequence[Shard], classes: Sequence[str]) -> str:
    """A hash of the names and checksums of the shards and of the classes, in order, as 16 hexadecimal digits."""
    content = [[[shard.name, shard.sha256] for shard in shards], list(classes)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _other_version(where: str, version: Any) -> str:
    found = "no version of the format" if version is None else f"version {version!r} of the format"
    return f"{where}: {found}, this program reads version {VERSION}; prepare the data again"


def _version_of(text: str | bytes) -> Any:
    """The version in the JSON; None if it is missing, VERSION if the text is not a JSON object."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return VERSION
    return values.get("version") if isinstance(values, dict) else VERSION


def _check_manifest(manifest: Manifest) -> None:
    """Checks beyond types. Raises ValueError or UserError."""
    manifest.schema  # noqa: B018 checks the encoding and the geometry
    if manifest.revision < 1:
        raise ValueError(f"revision {manifest.revision}")
    counts = [
        manifest.rows,
        manifest.inputs,
        manifest.duplicates,
        manifest.deleted,
        *manifest.rejects.values(),
        *manifest.class_counts,
    ]
    if min(counts) < 0:
        raise ValueError("a negative count")
    for name in ("mean", "std"):
        values = getattr(manifest, name)
        if values is not None and (len(values) != 3 or not all(map(math.isfinite, values))):
            raise ValueError(f"{name} {values} is not three finite numbers")
    for shard in manifest.shards:
        if not _SHARD_NAME.fullmatch(shard.name):
            raise ValueError(f"{shard.name!r} cannot be the name of a shard")
    names = {shard.name for shard in manifest.shards}
    if len(names) < len(manifest.shards):
        raise ValueError("two shards have the same name")


@dataclass(kw_only=True, slots=True)
class Receipt:
    """Summary of the output of a writer, sufficient to build the manifest without opening shards. `pixels` contains the
    number of measured pixels and, per channel, their sum and sum of squares (values in [0, 1])."""

    shards: list[Shard] = field(default_factory=list)
    rows: int = 0
    class_counts: dict[int, int] = field(default_factory=dict)
    pixels: list[float] = field(default_factory=lambda: [0.0] * 7)

    def to_dict(self) -> dict[str, Any]:
        counts = {str(label): count for label, count in sorted(self.class_counts.items())}
        shards = [shard.to_dict() for shard in self.shards]
        return {"shards": shards, "rows": self.rows, "class_counts": counts, "pixels": self.pixels}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Receipt":
        return cls(
            shards=[Shard(**shard) for shard in values["shards"]],
            rows=values["rows"],
            class_counts={int(label): count for label, count in values["class_counts"].items()},
            pixels=values["pixels"],
        )

    @classmethod
    def total(cls, receipts: Iterable["Receipt"]) -> "Receipt":
        """Merges receipts of several writers, with shards in the given order."""
        total = cls()
        for receipt in receipts:
            total.shards.extend(receipt.shards)
            total.rows += receipt.rows
            for label, count in receipt.class_counts.items():
                total.class_counts[label] = total.class_counts.get(label, 0) + count
            total.pixels = [a + b for a, b in zip(total.pixels, receipt.pixels, strict=True)]
        return total

    def moments(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and standard deviation per channel of the measured pixels, or (None, None)."""
        n, sums, squares = self.pixels[0], np.array(self.pixels[1:4]), np.array(self.pixels[4:])
        if not n:
            return None, None
        mean = sums / n
        std = np.sqrt(np.maximum(0.0, squares / n - mean**2))
        return [round(float(m), 6) for m in mean], [round(float(s), 6) for s in std]


@dataclass(frozen=True, slots=True)
class Reject:
    """A rejected input: its key, its file, the reason (from a small fixed set), and details."""

    key: str
    source: str
    reason: str
    detail: str = ""
