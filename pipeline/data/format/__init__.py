"""The shard format and the manifest of a dataset.

A dataset is a local or s3:// folder with `part-*.parquet`, `rejects.parquet`, and `manifest.json`, which is written
last, so a folder without it is unfinished. Shards are ordinary Parquet files (pandas, pyarrow and Hugging Face
`datasets` can open them) with a layout that allows reading a row group without a Parquet reader:

- columns `key`, `label`, `width`, `height`, `image`, in this order, all required, uncompressed, PLAIN-encoded, with one
page per
  column chunk. A row group is therefore one byte range, and its image column is a header followed by the values:
  fixed-size rows for encoding `patches`, (uint32 length, bytes) pairs for encoding `jpeg`;
- the manifest has the byte ranges and their checksums, so a reader makes one range request per row group, does not read
  footers, and can memory-map patches in place.

constants.py  names of files, default sizes, versions
manifest.py   Schema, Shard, Manifest, Receipt, Reject
writer.py     ShardWriter, build_manifest, finish_dataset, write_dataset
dataset.py    Dataset, open_dataset
pages.py      parses row groups
verify.py     verify_dataset: checks a dataset against its manifest
describe.py   describe_dataset: statistics, contact sheet, class histogram
"""

from typing import TYPE_CHECKING

from pipeline import lazy
from pipeline.data.format.constants import (
    MAX_ROW_GROUP_BYTES,
    REJECTS,
    ROW_GROUP_BYTES,
    SHARD_BYTES,
    UNLABELLED,
    Encoding,
)
from pipeline.revision_names import MANIFEST

if TYPE_CHECKING:
    from pipeline.data.format.dataset import Dataset, open_dataset
    from pipeline.data.format.manifest import Label, Manifest, Receipt, Reject, Schema, Shard
    from pipeline.data.format.pages import RowGroup
    from pipeline.data.format.writer import ShardWriter, build_manifest, finish_dataset, rejects_table, write_dataset

__all__ = [
    "MANIFEST",
    "MAX_ROW_GROUP_BYTES",
    "REJECTS",
    "ROW_GROUP_BYTES",
    "SHARD_BYTES",
    "UNLABELLED",
    "Dataset",
    "Encoding",
    "Label",
    "Manifest",
    "Receipt",
    "Reject",
    "RowGroup",
    "Schema",
    "Shard",
    "ShardWriter",
    "build_manifest",
    "finish_dataset",
    "open_dataset",
    "rejects_table",
    "write_dataset",
]

__getattr__ = lazy.exports(
    __name__,
    {
        "dataset": ("Dataset", "open_dataset"),
        "manifest": ("Label", "Manifest", "Receipt", "Reject", "Schema", "Shard"),
        "pages": ("RowGroup",),
        "writer": ("ShardWriter", "build_manifest", "finish_dataset", "rejects_table", "write_dataset"),
    },
)
