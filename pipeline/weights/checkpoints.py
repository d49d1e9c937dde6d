"""Finds the committed checkpoints of a run and detects damaged ones. `pipeline.training.checkpoint` writes them.

<run>/checkpoints/step-00001000/COMMIT.json     written last: see `pipeline.commit`
"""

import hashlib
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline import commit, storage
from pipeline.commit import COMMIT, FORMAT, Damaged, OtherFormat
from pipeline.errors import StorageError, UserError

__all__ = [
    "COMMIT",
    "FORMAT",
    "THREADS",
    "Checkpoint",
    "Damaged",
    "OtherFormat",
    "by_score",
    "damage",
    "find",
    "folder",
    "latest",
    "read",
    "resolve",
    "sha256",
]

THREADS = 8
"""Number of files read in parallel."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint: its folder, its step, and the content of COMMIT.json."""

    uri: str
    step: int
    commit: dict[str, Any]


def folder(run: str, step: int) -> str:
    """The folder of the checkpoint of a step."""
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def find(run: str) -> list[Checkpoint]:
    """The committed checkpoints of a run, oldest first. Uncommitted folders are ignored."""
    found = []
    for checkpoint in _scan(run):
        if isinstance(checkpoint, Checkpoint):
            found.append(checkpoint)
        else:
            logger.warning("a checkpoint is skipped: %s", checkpoint)
    return found


def _scan(run: str) -> list[Checkpoint | UserError]:
    """The committed checkpoints of a run, oldest first; for a damaged COMMIT.json, the error of reading it."""
    root = storage.join(run, "checkpoints")
    found: list[tuple[int, str, Checkpoint | UserError]] = []
    for file in storage.list_files(root):
        name, _, rest = file.path.partition("/")
        step = commit.step_of(name)
        if rest == COMMIT and step is not None:
            uri = storage.join(root, name)
            try:
                found.append((step, uri, read(uri)))
            except FileNotFoundError:  # another process removed it meanwhile
                continue
            except (OtherFormat, StorageError):
                raise
            except UserError as error:
                found.append((step, uri, error))
    return [checkpoint for _, _, checkpoint in sorted(found, key=lambda entry: entry[:2])]


def read(uri: str) -> Checkpoint:
    """The checkpoint in a folder with a valid COMMIT.json. Raises as `pipeline.commit.read_commit` does."""
    content = commit.read_commit(uri)
    return Checkpoint(uri, int(content["step"]), content)


def damage(checkpoint: Checkpoint, checksums: bool = True) -> str | None:
    """The problem of a checkpoint's files, or None. Always compares sizes; with `checksums` also contents. Raises
    StorageError for an outage of the store, which is not damage.
    """
    present = {file.path: file.size for file in storage.list_files(checkpoint.uri)}
    files = checkpoint.commit["files"]
    for path, expected in files.items():
        if path not in present:
            return f"{path} is missing"
        if present[path] != expected["size"]:
            return f"{path} has {present[path]} bytes instead of {expected['size']}"
    if checksums:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(_digest_or_none, (storage.join(checkpoint.uri, path) for path in files))
            for (path, expected), digest in zip(files.items(), digests, strict=True):
                if digest is None:
                    return f"{path} is missing"
                if digest != expected["sha256"]:
                    return f"{path} does not match its checksum"
    return None


def _digest_or_none(uri: str) -> str | None:
    try:
        return sha256(uri)
    except FileNotFoundError:  # another process removed it meanwhile
        return None


def latest(run: str, checksums: bool = True) -> Checkpoint | None:
    """The newest intact checkpoint. Damaged ones are skipped with a warning."""
    skipped: list[str] = []
    for checkpoint in reversed(find(run)):
        problem = damage(checkpoint, checksums)
        if problem is None:
            for broken in skipped:
                logger.warning("%s; going back to %s", broken, checkpoint.uri)
            return checkpoint
        skipped.append(f"{checkpoint.uri} is skipped: {problem}")
    for broken in skipped:
        logger.warning("%s; there is no earlier checkpoint", broken)
    return None


def by_score(found: Iterable[Checkpoint], metric: str | None) -> list[Checkpoint]:
    """The checkpoints that have the metric, best first; of equal scores, the newest first. Without a metric, none."""
    scored = [c for c in found if isinstance(c.commit.get("metrics", {}).get(metric), (int, float))]
    return sorted(scored, key=lambda c: (c.commit["metrics"][metric], c.step), reverse=True)


def resolve(uri: str) -> Checkpoint:
    """The checkpoint in a checkpoint folder, or the newest one of a run folder. Compares sizes. Raises UserError if there
    is none, and Damaged for a damaged one, which names the newest intact one: scores and exports of an earlier
    checkpoint would not be noticed.
    """
    uri = storage.normalise(uri)
    found = [read(uri)] if storage.exists(storage.join(uri, COMMIT)) else _scan(uri)
    if not found:
        raise UserError(f"{uri}: no complete checkpoint{_why_none(uri)}")
    newest = found.pop()
    problem = _problem(newest)
    if problem is None and isinstance(newest, Checkpoint):
        return newest
    earlier = next(
        (c.uri for c in reversed(found) if isinstance(c, Checkpoint) and _problem(c) is None), "an earlier one"
    )
    raise Damaged(f"{problem}; use {earlier}")


def _why_none(uri: str) -> str:
    if storage.exists(uri):
        return f" yet (in a run folder: checkpoints/step-.../{COMMIT})"
    return f", and no such folder{storage.nearest_folder(uri)}"


def _problem(checkpoint: Checkpoint | UserError) -> str | None:
    """The problem of a checkpoint, without its checksums, or None."""
    if isinstance(checkpoint, UserError):
        return str(checkpoint)
    problem = damage(checkpoint, checksums=False)
    return problem and f"{checkpoint.uri}: damaged checkpoint: {problem}"


def sha256(uri: str) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with storage.open_file(uri) as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()
