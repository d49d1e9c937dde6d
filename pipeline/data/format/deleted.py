"""The keys that deletions have removed from a dataset, as hashes: `deleted@N.parquet` beside the manifest of revision N.

Every later revision has all hashes of the one before it, so that an append leaves these images out, also after
`delete --purge`. The keys themselves, which may name a person, are not kept."""

import hashlib
import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError
from pipeline.revision_names import DELETED, report_name

COLUMN = "key_hash"


def digest_of(hashes: np.ndarray) -> str:
    """SHA-256 of hashes (uint64), in any order, for the manifest."""
    return hashlib.sha256(np.unique(hashes).astype("<u8").tobytes()).hexdigest()


def write_deleted(folder: str, revision: int, hashes: np.ndarray) -> None:
    """Writes the hashes (uint64) of a revision."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({COLUMN: pa.array(np.unique(hashes), pa.uint64())}), sink)
    storage.write_bytes(storage.join(folder, report_name(DELETED, revision)), sink.getvalue().to_pybytes())


def read_deleted(folder: str, manifest: Manifest) -> np.ndarray:
    """The sorted hashes (uint64) of the keys deleted up to a revision. Raises UserError if their file is missing or
    damaged."""
    if not manifest.deleted and not manifest.deleted_sha256:
        return np.empty(0, np.uint64)
    where = storage.join(folder, report_name(DELETED, manifest.revision))
    try:
        hashes = pq.read_table(io.BytesIO(storage.read_bytes(where)))[COLUMN].to_numpy()
    except FileNotFoundError as error:
        raise UserError(
            f"{where}: missing; it has the hashes of the deleted keys, without which deleted images may come back; copy it "
            "from where the dataset came from"
        ) from error
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{where}: not readable ({error}); copy it again from where the dataset came from") from error
    hashes = np.unique(hashes.astype(np.uint64))
    if digest_of(hashes) != manifest.deleted_sha256:
        raise UserError(
            f"{where}: not the hashes that the manifest was written with; copy it again from where the dataset came from"
        )
    return hashes


def verify_deleted(folder: str, manifest: Manifest) -> Iterator[str]:
    """The problems of the file, one line each."""
    name = report_name(DELETED, manifest.revision)
    try:
        read_deleted(folder, manifest)
    except UserError as error:
        yield f"{name}: {str(error).partition(': ')[2]}"
