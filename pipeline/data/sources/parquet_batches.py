"""Parquet files in batches of limited size, because a small file may hold gigabytes.

for batch in read_batches(uri, file, ["url", "label"]): ...
"""

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.codecs import Refused
from pipeline.errors import UserError, plural

BATCH_BYTES = 64 << 20  # of labels or addresses that are decoded at a time
MAX_VALUE_BYTES = 8 << 20  # of a label or address
MAX_COLUMN_BYTES = 128 << 20  # of a column of a row group, if it is compressed by more than MAX_RATIO
MAX_RATIO = 64  # maximum compression ratio; columns of images are below it


def read_batches(
    uri: str, file: pq.ParquetFile, columns: Sequence[str], *, groups: Iterable[int] | None = None, rows: int = 1 << 16
) -> Iterator[pa.RecordBatch]:
    """Batches of some columns of all row groups (or of `groups`), of at most `rows` rows and about BATCH_BYTES. Raises
    UserError for a column that unpacks to too many bytes, and for a value that is too long for a name or an address."""
    for group in (range(file.num_row_groups) if groups is None else groups) if columns else ():
        largest, refused = largest_value(file, group, columns)
        if refused:
            raise UserError(f"{uri}: {refused.detail}")
        size = min(rows, max(1, BATCH_BYTES // largest)) if largest else rows
        for batch in file.iter_batches(size, row_groups=[group], columns=list(columns), use_threads=False):
            _refuse_long_values(uri, batch)
            yield batch


def _refuse_long_values(uri: str, batch: pa.RecordBatch) -> None:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_binary(column.type):
            longest = pc.max(pc.binary_length(column)).as_py() or 0
            if longest > MAX_VALUE_BYTES:
                raise UserError(f"{uri}: a value of column {name} has {longest:,} bytes, more than {MAX_VALUE_BYTES:,}")


def largest_value(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> tuple[int, Refused | None]:
    """(bytes that one value may have, why the row group is not read).

    All rows may refer to one value of the column's dictionary, so in a well compressed column a value may be as large as
    the column. 0: no column is well compressed."""
    largest = 0
    metadata = file.metadata.row_group(group)
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema.partition(".")[0] not in columns:
            continue
        size, packed = column.total_uncompressed_size, max(1, column.total_compressed_size)
        if size > max(MAX_COLUMN_BYTES, MAX_RATIO * packed):
            where = f"column {column.path_in_schema} of row group {group} with {plural(metadata.num_rows, 'row')}"
            return 0, Refused("too many bytes", f"{where}: {packed:,} bytes unpack to {size:,}")
        if size > 4 * packed:
            largest = max(largest, size)
    return largest, None
