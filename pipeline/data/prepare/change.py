"""What all changes of a finished dataset (append, deletion, purge) have in common: only one is made at a time, each from
the newest revision, and a stopped one is finished before the next begins."""

import contextlib
import os
from collections.abc import Iterable, Iterator

from pipeline import storage
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.revisions import revisions
from pipeline.data.prepare.config import LISTINGS, WORK
from pipeline.errors import UserError
from pipeline.lease import LAUNCH, Lease

APPEND, DELETE = "append", "delete"  # fields of plan.json and kinds of revisions


def lock_output(work: str) -> Lease:
    """The lock of an unfinished dataset. Entering raises InUse while another process works in the folder `work`."""
    return Lease(work, "prepare", doing="being written", remedy="repeat the command when that one has ended")


@contextlib.contextmanager
def lock_datasets(root: str, sets: Iterable[str]) -> Iterator[None]:
    """Locks an output and its datasets (splits), so that a change of the whole and a change of one split exclude each
    other. Raises InUse if another process holds one of the locks."""
    with contextlib.ExitStack() as stack:
        for folder in sorted({root, *sets}):
            work = storage.join(folder, WORK)
            stack.callback(_remove_if_empty, work)
            stack.enter_context(lock_output(work))
        yield


def _remove_if_empty(work: str) -> None:
    if not storage.is_remote(work):
        with contextlib.suppress(OSError):  # it has files
            os.rmdir(work)


def has_work(folder: str) -> bool:
    """Whether a folder has plans or receipts of a command that was stopped, in addition to the lock and unfinished
    listings, which are made before an output is claimed."""
    files = storage.list_files(storage.join(folder, WORK))
    return any(file.path != LAUNCH and not file.path.startswith(f"{LISTINGS}/") for file in files)


def is_unfinished(folder: str) -> bool:
    """Whether a command was stopped in this folder and can be continued."""
    return storage.exists(storage.join(folder, WORK, "plan.json"))


def refuse_unfinished(folders: Iterable[str]) -> None:
    """Raises UserError if a command was stopped in one of the folders."""
    for folder in folders:
        if is_unfinished(folder):
            raise UserError(f"{folder}: has unfinished work; repeat the command that was stopped there first")


def begin(root: str, sets: Iterable[str], planned: int | None) -> tuple[int, dict[str, Manifest]]:
    """(number of the next revision, {dataset: the manifest from which the change begins}). To be called under the lock.

    planned: the number that a stopped change has chosen; None for a new one, which removes the receipts left by a finished
    change that was stopped during its cleanup. Raises UserError if there is a newer revision than the planned one."""
    everything = {uri: revisions(uri) for uri in sets}
    newest = max(max(there) for there in everything.values())
    if planned is None and has_work(root):
        for file in storage.list_files(storage.join(root, WORK)):
            if file.path != LAUNCH:
                storage.remove(file.uri)
    number = planned or newest + 1
    if newest > number:
        work = storage.join(root, WORK)
        raise UserError(
            f"{root}: revision {newest} was made since the stopped change began; remove {work} and repeat the command"
        )
    return number, {uri: there[max(n for n in there if n < number)] for uri, there in everything.items()}
