"""Names and sizes of the shard format. Imports no library, so that a config can use them."""

from typing import Literal

VERSION = 5
REJECTS = "rejects.parquet"
UNLABELLED = -1
ROW_GROUP_BYTES = 16 << 20
MAX_ROW_GROUP_BYTES = 1 << 30  # Arrow's binary arrays end at 2 GiB, and an image comes on top
SHARD_BYTES = 512 << 20

Encoding = Literal["jpeg", "patches"]
