"""The shard format: how images lie on disk, and the manifest that makes a folder of shards a dataset.

A dataset is a folder, local or s3://, of `part-*.parquet` files, `rejects.parquet`, and `manifest.json`, which is written
last: a folder without it is unfinished. Shards are ordinary Parquet (pandas, pyarrow and Hugging Face `datasets` open
them) written so that a row group can be used without a Parquet reader:

- columns `key`, `label`, `width`, `height`, `image`, in this order, all required, uncompressed, plainly encoded, and one
  page per column chunk. A row group is therefore one byte range, and the image column in it is one header followed by
  the bare values: fixed-size rows for encoding `patches`, (uint32 length, bytes) pairs for encoding `jpeg`;
- the manifest holds those byte ranges and their checksums, so a reader makes one range request per row group and never
  reads a footer, and patches can be memory-mapped in place.

constants.py  names of files, default sizes, versions
manifest.py   Schema, Shard, Manifest, Receipt, Reject
writer.py     ShardWriter, finish_dataset, write_dataset
dataset.py    Dataset, open_dataset
pages.py      row groups from their bytes
verify.py     verify_dataset: is a dataset what its manifest says?
describe.py   describe_dataset: numbers, contact sheet, chart of classes
"""

from typing import TYPE_CHECKING

from pipeline import lazy
from pipeline.data.format.constants import (
    MANIFEST,
    MOST_ROW_GROUP_BYTES,
    REJECTS,
    ROW_GROUP_BYTES,
    SHARD_BYTES,
    UNLABELLED,
    Encoding,
)

if TYPE_CHECKING:
    from pipeline.data.format.dataset import Dataset, open_dataset
    from pipeline.data.format.manifest import Label, Manifest, Receipt, Reject, Schema, Shard
    from pipeline.data.format.pages import RowGroup
    from pipeline.data.format.writer import ShardWriter, finish_dataset, rejects_table, write_dataset

__all__ = [
    "MANIFEST",
    "MOST_ROW_GROUP_BYTES",
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
        "writer": ("ShardWriter", "finish_dataset", "rejects_table", "write_dataset"),
    },
)
