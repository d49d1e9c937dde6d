"""Configuration of `prepare` and its recipes; checks.py validates it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline import config as configuration
from pipeline.data.downloads.config import CONTENT, DownloadConfig
from pipeline.data.format.constants import ROW_GROUP_BYTES, SHARD_BYTES, Encoding

WORK = "_work"  # folder inside the output: plan and receipts of an unfinished dataset
LISTINGS = "listing"  # folder inside WORK: unfinished listings of large sources
LETTERS, DIGITS = "demo:letters", "demo:digits"  # sources that builtin.py writes
FROM_SOURCE, MERGE = ("from-source",), ("merge",)  # values of --splits that use the splits of the source


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Settings that affect the content of a dataset, and its location."""

    source: tuple[str, ...] = ()
    """Folders, archives or prefixes of images (local, s3://, gs://, az://, hf://; https:// for files),
    or lists of URLs. Several sources become one dataset."""
    output: str = ""
    """Folder or prefix (s3://, gs://, az://) for the dataset: new, empty, or with the unfinished dataset of the same
    command."""
    format: str = "auto"
    """Format of the sources: auto (detected from file names), folder, tar, zip, parquet, arrow, tfrecord, cifar or
    urls (tables of addresses)."""
    labels: str | None = None
    """Table of file names and labels: CSV, TSV, text, JSONL, JSON, Parquet, or ImageNet's devkit archive."""
    label_column: str | None = None
    """Column, JSON field or TFRecord feature with the label, in --labels and in the sources. Several names, separated
    by commas, are one-hot columns; txt and cls select archive members with that extension."""
    file_column: str | None = None
    """Column or feature with the file name, in --labels and in the sources."""
    split_column: str | None = None
    """Column, field or feature with the split, in --labels and in the sources."""
    url_column: str | None = None
    """Column with the address of the image, in lists of URLs."""
    download_only: bool = False
    """Keep the images of lists of URLs as they are, in WebDataset archives, instead of preparing a dataset."""
    allow_private_hosts: bool = False
    """Download from private networks and this machine, too, but never from the metadata servers of clouds."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """Downloads of lists of URLs."""
    class_level: int | None = None
    """Level of the folder that names the class; 1 is the first below the source. None: detect automatically."""
    label_map: str | None = None
    """Class names in index order (text or a JSON list), or a JSON object that renames classes. Images with other labels
    are rejected."""
    include: tuple[str, ...] = ()
    """Globs over keys such as class/name.jpg. Files that match none of the globs are skipped."""
    licence: str | None = None
    """Licence of the images, for the manifest and for model cards."""
    unlabelled: bool = False
    """Accept images without labels."""
    sample: int | None = None
    """Maximum number of images, sampled evenly from the sources."""
    encoding: Encoding = "jpeg"
    """jpeg: JPEG with a shorter side of --size; the loader decodes and crops. patches: the N x (P*P*C) matrix of
    pixels, which needs no decoding."""
    size: int = 256
    """Shorter side for jpeg, or side of the square for patches, in pixels. With jpeg, smaller images keep their size."""
    small: Literal["lossless", "jpeg"] = "lossless"
    """Images in lossless formats that need no resizing: lossless stores them as PNG; jpeg compresses them unless they
    are PNG files (docs/data.md lists the sizes)."""
    quality: int = 90
    """JPEG quality of re-encoded images, 1 to 100 (4:2:0 subsampling)."""
    patch_size: int = 16
    """Side of a patch, in pixels."""
    fit: Literal["crop", "squash"] = "crop"
    """How to make images square for patches: centre crop, or squash."""
    splits: tuple[str, ...] = ()
    """Fractions such as train=0.9 val=0.1: a hash of the key assigns images, and each split becomes a dataset
    OUTPUT/NAME. from-source: the splits of the source (folders train/ and val/, train-*.parquet, a split column).
    merge: one dataset of all splits."""
    shuffle: bool = True
    """Shuffle the images over all shards: files before they are read, archives according to --shuffle-archives."""
    shuffle_archives: Literal["auto", "always", "never"] = "auto"
    """Archives: auto shuffles archives that are sorted by class, always shuffles all archives, never keeps their order.
    Shuffling needs a second pass over the shards."""
    seed: int = 0
    """Seed of the shuffle and of --sample."""
    deduplicate: Literal["off", "exact", "near", "report"] = "off"
    """Remove duplicates within the corpus: exact (equal pixels) or near (re-encoded, resized, mirrored). report lists
    near duplicates in duplicates.parquet without removing them."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation sets: datasets, or anything that --source accepts. Images that occur in them are removed."""
    distance: int = 30
    """Maximum Hamming distance of the 128-bit hashes at which two images are compared in detail
    (docs/decontamination.md)."""
    descriptor: str | None = None
    """TorchScript file of a network that turns images into vectors, such as sscd.torchscript.pt. Images with similar
    vectors are also compared in detail. Only use a file whose origin you trust."""
    descriptor_similarity: float = 0.6
    """Cosine similarity of two vectors at which their images are compared in detail."""
    descriptor_accept: float | None = None
    """Cosine similarity at which two images count as the same without a comparison of pixels. None: always compare."""
    descriptor_size: int | None = None
    """Side of the network's input, in pixels. None: from its descriptor.json, or 288."""
    descriptor_mean: tuple[float, ...] = ()
    """Mean of each channel, for pixels in [0, 1]. Default: from its descriptor.json, or ImageNet's."""
    descriptor_std: tuple[float, ...] = ()
    """Standard deviation of each channel. Default: from its descriptor.json, or ImageNet's."""
    descriptor_gpus: float = 0.0
    """GPUs of each actor that runs the network; 0 runs it on CPUs."""
    max_pixels: int = 100_000_000
    """Maximum image size, in pixels; larger images are rejected."""
    max_reject_fraction: float = 0.05
    """Maximum fraction of rejects, 0 to 1. Above it, the job fails at the end."""
    row_group_bytes: int = ROW_GROUP_BYTES
    """Size of a row group, the unit of reading in the loader, in bytes."""
    shard_bytes: int = SHARD_BYTES
    """Size of a shard file, in bytes."""
    unit_bytes: int = 1 << 30
    """Maximum input of one unit of work, in bytes. Small corpora use smaller units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareJob(PrepareConfig):
    """PrepareConfig plus settings that do not affect the dataset: the cluster and the tracking server."""

    address: str | None = None
    """Ray cluster to join (auto or host:port). None: the cluster of the submitted job, or an embedded Ray."""
    num_cpus: int | None = None
    """CPU cores for an embedded Ray. None: all."""
    tracking: bool = True
    """Log the run to MLflow."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""


def demo() -> PrepareConfig:
    """Printed letters in the fonts of matplotlib, 861 images in two splits; about 5 s on two cores.

    Source: the installed package, written as PNG class folders to runs/demo/raw. Expected: 861 rows, 41 classes, no
    rejects; about 80% train, the rest test. To use your own class folders, pass --source."""
    return PrepareConfig(
        source=(LETTERS,),
        output="runs/demo/data",
        encoding="jpeg",
        size=32,
        splits=("train=0.8", "test=0.2"),
    )


def demo_digits() -> PrepareConfig:
    """Scikit-learn's handwritten digits, 1,797 images in two splits, for the transfer of the demo; about 5 s on two
    cores.

    Source: the installed package, written as PNG class folders to runs/demo/raw. Expected: 1,797 rows, 10 classes, no
    rejects; about 80% train, the rest test."""
    return replace(demo(), source=(DIGITS,), output="runs/demo/digits")


def jpeg256() -> PrepareConfig:
    """JPEG with a shorter side of 256, for pre-training at 224 (the default with --source).

    Expected: about 24 KB per image; 500 ImageNet originals per second and core.
    """
    return PrepareConfig()


def patches224() -> PrepareConfig:
    """224x224 in 16x16 patches, for evaluation sets and GPU nodes with few CPUs: 150 KB per image, no decoding."""
    return PrepareConfig(encoding="patches", size=224, patch_size=16)


def patches32() -> PrepareConfig:
    """32x32 in 4x4 patches, for CIFAR, SVHN and other tiny images."""
    return PrepareConfig(encoding="patches", size=32, patch_size=4)


RECIPES: dict[str, Callable[[], PrepareConfig]] = {
    "demo": demo,
    "demo_digits": demo_digits,
    "jpeg256": jpeg256,
    "patches224": patches224,
    "patches32": patches32,
}


def identity(config: PrepareConfig) -> dict[str, Any]:
    """The settings that affect the content of the dataset. They must be the same when a job is continued."""
    values = configuration.to_dict(config)
    values["download"] = {name: values["download"][name] for name in CONTENT}
    return {name: value for name, value in values.items() if name not in ("output", "max_reject_fraction")}
