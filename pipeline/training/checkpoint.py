"""Atomic checkpoints that can be loaded on any number of workers.

    <run>/checkpoints/step-00001000/
        model.safetensors, config.json     the model, loadable without anything of ours (float32)
        ema.safetensors                    its exponential moving average, when the run keeps one
        state/param-00000-of-00002.safetensors ...   every worker's slices of one kind (param, exp_avg, ...):
                                           "kind:parameter:start" -> 1-D float32
        COMMIT.json                        step, and sizes and SHA-256 of all files; written last, so a folder without it
        is incomplete

Each worker writes the slices that it owns in the background (`Writer`); rank 0 assembles the model file from the
slices. A reader loads the slices it needs, independent of the number of workers and the ZeRO stage that wrote them
(`StateReader`). Only the attempt that started last may write; <run>/attempt.json names it, and every attempt checks it
before writing. All attempts after the first use separate folders (step-00001000-3f9a01c2b4d5), so that an attempt that
was suspended after the check cannot overwrite checkpoints that a later attempt has committed."""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from pipeline import storage
from pipeline.commit import STEP_FOLDER, step_of, write_commit
from pipeline.errors import StorageError, Unavailable, UserError, plural
from pipeline.weights.checkpoints import (
    COMMIT,
    THREADS,
    Checkpoint,
    OtherFormat,
    by_score,
    damage,
    find,
    folder,
    latest,
    read,
    sha256,
)

ATTEMPT = "attempt.json"
WRITE_ERRORS = (StorageError, OSError, SafetensorError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors that a retry cannot fix: the disk is full, or write permission is missing."""

logger = logging.getLogger(__name__)


class StorageFull(UserError):
    """The storage is full or read-only."""


def remove(checkpoint: Checkpoint) -> None:
    """Deletes a checkpoint, COMMIT.json first, so that an interrupted deletion does not leave a valid-looking
    checkpoint."""
    storage.remove(storage.join(checkpoint.uri, COMMIT))
    storage.remove(checkpoint.uri, recursive=True)


def remove_orphans(run: str) -> list[str]:
    """Deletes folders of earlier attempts without COMMIT.json, and nothing else: a user may keep files beside them.
    Call it on one worker only, before training starts."""
    orphans = _uncommitted(run)
    for name in orphans:
        storage.remove(storage.join(run, "checkpoints", name), recursive=True)
    return orphans


def _folders(run: str) -> dict[str, bool]:
    """{name of a checkpoint's folder: whether it has a COMMIT.json}, sorted by step."""
    found: dict[str, bool] = {}
    for file in storage.list_files(storage.join(run, "checkpoints")):
        name, _, rest = file.path.partition("/")
        if rest and STEP_FOLDER.fullmatch(name):
            found[name] = found.get(name, False) or rest == COMMIT
    return dict(sorted(found.items(), key=lambda item: (step_of(item[0]) or 0, item[0])))


def _uncommitted(run: str) -> list[str]:
    return [name for name, is_committed in _folders(run).items() if not is_committed]


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderState:
    """State of a folder under checkpoints/. `about` describes its content or why it is unusable."""

    uri: str
    state: Literal["complete", "damaged", "uncommitted"]
    about: str


def survey(run: str) -> list[FolderState]:
    """State of every checkpoint's folder, sorted by step. Reads all files and verifies their checksums."""
    findings = []
    for name, is_committed in _folders(run).items():
        uri = storage.join(run, "checkpoints", name)
        if not is_committed:
            findings.append(
                FolderState(uri=uri, state="uncommitted", about=f"no {COMMIT}: incomplete, or still being written")
            )
            continue
        try:
            checkpoint = read(uri)
            problem = damage(checkpoint)
        except (OtherFormat, StorageError):
            raise
        except UserError as error:
            problem = str(error).removeprefix(f"{uri}: ")
        if problem:
            findings.append(FolderState(uri=uri, state="damaged", about=problem))
            continue
        files = checkpoint.commit["files"]
        size = sum(info["size"] for info in files.values()) / 1e6
        about = f"step {checkpoint.step}, {plural(len(files), 'file')}, {size:.1f} MB, {checkpoint.commit.get('created', '')}"
        findings.append(FolderState(uri=uri, state="complete", about=about))
    return findings


def repair(run: str, delete: bool = False) -> tuple[list[str], bool]:
    """Lines that describe each checkpoint of a run and which one it would resume from; and whether all are valid
    afterwards.

    delete: removes damaged and uncommitted checkpoints. Do not use it during a run, whose current checkpoint is
    uncommitted. Raises UserError when there are no checkpoints."""
    run = storage.normalise(run)
    findings = survey(run)
    if not findings:
        raise UserError(f"{run}: no checkpoints; give the --output of a run")
    lines = [f"{finding.state:12s} {finding.uri}: {finding.about}" for finding in findings]
    complete = [finding.uri for finding in findings if finding.state == "complete"]
    broken = [finding for finding in findings if finding.state != "complete"]
    lines.append(f"resumes from {complete[-1]}" if complete else "no complete checkpoint: the run would start over")
    for finding in broken if delete else []:
        storage.remove(storage.join(finding.uri, COMMIT))
        storage.remove(finding.uri, recursive=True)
        lines.append(f"removed {finding.uri}")
    return lines, delete or not broken


# ---------------------------------------------------------------- writing


class Writer:
    """Writes the part of one worker in the background; rank 0 adds the model and commits after all parts are written.

    Every rank creates one, calls `start` once, and calls `save` at the same steps. If storage is unavailable or full, a
    warning is logged and the checkpoint is skipped; training continues.
    """

    def __init__(
        self,
        run: str,
        model: nn.Module,
        *,
        keep_last: int,
        best: str | None = None,
        deliver_records: Callable[[], Any] | None = None,
    ):
        """model: before DeepSpeed partitions its parameters (used for shapes, buffers and config).

        deliver_records: called on rank 0 before each commit. A run that resumes from a checkpoint does not log earlier
        steps again, so their records must be delivered before the commit."""
        self.run, self.keep_last, self.best, self.deliver_records = run, keep_last, best, deliver_records
        self.model_config: dict[str, Any] = cast(Any, model).config
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.buffers = {k: v.clone() for k, v in model.state_dict().items() if k not in self.shapes}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        # A separate process group, because these collectives run in another thread than those of training.
        self.group = dist.new_group(backend="gloo") if self.world > 1 else None
        self.attempt = uuid.uuid4().hex[:12]
        self.suffix = f"-{self.attempt}"
        """Suffix of the folders of this attempt; empty for the first attempt of a run."""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Exception | None] | None = None
        self.newest = ""
        """The checkpoint that was written last. Its files were read for their checksums a moment ago."""
        self.verified: dict[str, frozenset[tuple[str, int, str]]] = {}
        """Checkpoint on a store -> its files (`_stamps`) when they were as committed."""
        self.failed: list[int] = []
        """Steps whose checkpoint could not be written."""
        self.waited = 0.0
        """Seconds that training was blocked by checkpoints: copying the state, and waiting for the previous
        checkpoint."""

    def start(self) -> Checkpoint | None:
        """Takes over the run from earlier attempts. Returns the checkpoint to resume from, the same on every worker."""
        self.suffix = self._from_rank_0(self._take_over() if self.rank == 0 else None)
        return self._from_rank_0(latest(self.run) if self.rank == 0 else None)

    def _take_over(self) -> str:
        """Makes this attempt the owner of the run. Returns the suffix of its folders."""
        place = storage.join(self.run, ATTEMPT)
        others = bool(storage.list_files(storage.join(self.run, "checkpoints")))
        if storage.create_bytes(place, self._about_me()) and not others:
            return ""
        storage.write_bytes(place, self._about_me())
        for name in remove_orphans(self.run):
            logger.info("removed uncommitted checkpoint %s", name)
        return f"-{self.attempt}"

    def folder(self, step: int) -> str:
        """Folder of the checkpoint of a step in this attempt."""
        return folder(self.run, step) + self.suffix

    def save(self, step: int, snapshot: Callable[[], dict[str, Tensor]], about: dict[str, Any]) -> None:
        """Starts writing a snapshot (`Engine.snapshot`), after waiting for the previous one to finish."""
        problem = self._wait_for_pending()
        if problem is not None and self.rank == 0:
            logger.warning(
                "the checkpoint of step %d could not be written; training continues: %s", self.failed[-1], problem
            )
        start = time.perf_counter()
        tensors = snapshot()
        self.waited += time.perf_counter() - start
        self.pending = self.thread.submit(self._write, step, tensors, about)

    def wait(self) -> None:
        """Waits until the last save is committed. Raises its error; StorageFull when storage is full or read-only."""
        problem = self._wait_for_pending()
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Stops the thread after the last save. Never raises, because it may run while an exception propagates."""
        self.thread.shutdown()

    def _wait_for_pending(self) -> Exception | None:
        if self.pending is None:
            return None
        start = time.perf_counter()
        pending, self.pending = self.pending, None
        problem = pending.result()
        self.waited += time.perf_counter() - start
        return problem

    def _from_rank_0(self, value: Any) -> Any:
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _write(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> Exception | None:
        """Saves on all workers or on none. Returns the error that prevented the save, the same on every worker; raises
        UserError when another attempt owns the run."""
        target = self.folder(step)
        problem: Exception | None = None
        if self.rank == 0:
            problem = self._attempt(lambda: self._check_owner(step))
        problem = self._from_rank_0(problem)
        if problem is None:
            problem = self._write_parts(target, step, tensors, about)
        if isinstance(problem, UserError) and not isinstance(problem, (StorageError, StorageFull)):
            raise problem
        if problem is not None:
            self.failed.append(step)
            if self.rank == 0:
                with contextlib.suppress(UserError, OSError):  # free the space of the incomplete checkpoint
                    storage.remove(target, recursive=True)
        return problem

    def _write_parts(
        self, target: str, step: int, tensors: dict[str, Tensor], about: dict[str, Any]
    ) -> Exception | None:
        receipt: dict[str, dict] | Exception
        try:
            receipt = self._put_state(target, tensors)
        except WRITE_ERRORS as error:
            receipt = _plain(error)
        receipts = [receipt] * self.world
        if self.group is not None:
            dist.all_gather_object(receipts, receipt, group=self.group)
        problem: Exception | None = next((r for r in receipts if isinstance(r, Exception)), None)
        if self.rank == 0 and problem is None:
            files = {path: info for receipt in receipts for path, info in cast(dict, receipt).items()}
            problem = self._attempt(lambda: self._commit(target, step, files, about))
        return self._from_rank_0(problem)

    def _attempt(self, work: Callable[[], None]) -> Exception | None:
        """Runs `work`. Returns its error as an exception that can be sent to other workers, or None."""
        try:
            work()
        except WRITE_ERRORS as error:
            return _plain(error)
        except UserError as error:
            return error
        return None

    def _about_me(self) -> bytes:
        about = {"attempt": self.attempt, "host": socket.gethostname(), "pid": os.getpid(), "workers": self.world}
        return json.dumps(about).encode()

    def _check_owner(self, step: int) -> None:
        place = storage.join(self.run, ATTEMPT)
        # An attempt that takes over writes the file, so if somebody has removed it, this attempt still owns the run.
        if not storage.exists(place) and storage.create_bytes(place, self._about_me()):
            logger.warning("%s was removed during the run; it is written again", place)
        owner = storage.read_json(place)
        if not isinstance(owner, dict) or "attempt" not in owner:
            raise UserError(f"{place} does not name the attempt that owns this run; repeat the command to continue")
        if owner["attempt"] != self.attempt:
            raise UserError(
                f"{self.run} was taken over by another attempt of this run (process {owner.get('pid')} on "
                f"{owner.get('host')}); this attempt ends without a checkpoint at step {step}"
            )

    def _put_state(self, target: str, tensors: dict[str, Tensor]) -> dict[str, dict]:
        """Writes this worker's files and returns their sizes and checksums. One file per kind, so that files are
        uploaded in parallel and the parameters can be read without the optimiser states."""
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kinds.setdefault(key.partition(":")[0], {})[key] = tensor
        name = f"-{self.rank:05d}-of-{self.world:05d}.safetensors"
        with ThreadPoolExecutor(THREADS) as pool:
            written = pool.map(lambda kind: _put_tensors(target, f"state/{kind}{name}", kinds[kind]), kinds)
            return {path: info for receipt in written for path, info in receipt.items()}

    def _commit(self, target: str, step: int, files: dict[str, dict], about: dict[str, Any]) -> None:
        self._check_owner(step)
        with StateReader(target, list(files)) as reader:
            for kind, name in (("param", "model.safetensors"), ("ema", "ema.safetensors")):
                if kind in reader.kinds:
                    weights = {k: flat.reshape(self.shapes[k]) for k, flat in reader.assemble(kind).items()}
                    files.update(_put_tensors(target, name, {**weights, **self.buffers}, {"format": "pt"}))
        config = json.dumps({"model": self.model_config, **about.get("config", {})}, indent=1).encode()
        storage.write_bytes(storage.join(target, "config.json"), config)
        files["config.json"] = {"size": len(config), "sha256": hashlib.sha256(config).hexdigest()}
        commit = {k: v for k, v in about.items() if k != "config"}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        if self.deliver_records is not None:
            self.deliver_records()
        self._check_owner(step)
        write_commit(target, {"step": step, "created": created, "workers": self.world, **commit, "files": files})
        try:
            self.newest = target
            if storage.is_remote(target):
                self.verified[target] = _stamps(target)
            self._remove_old(step)
        except (UserError, OSError) as error:  # the new checkpoint is complete all the same
            logger.warning("old checkpoints of %s stay: %s", self.run, error)

    def _remove_old(self, step: int) -> None:
        """Keeps the newest `keep_last` valid checkpoints and the best valid one by metric `best`.

        Nothing is removed until `keep_last` valid checkpoints exist; then damaged ones are removed too. Another
        checkpoint of the step that was just written is removed immediately if it is damaged, or lacks the scores of a
        validation that was stopped."""
        checkpoints = find(self.run)
        for checkpoint in checkpoints:
            is_replaced = checkpoint.uri != self.newest and checkpoint.commit.get("unvalidated")
            if checkpoint.step == step and (is_replaced or not self._is_valid(checkpoint)):
                remove(checkpoint)
                checkpoints = [other for other in checkpoints if other is not checkpoint]
        if len(checkpoints) <= self.keep_last:  # nothing to remove, so nothing to verify
            return
        spared = list(itertools.islice(filter(self._is_valid, reversed(checkpoints)), self.keep_last))
        if len(spared) < self.keep_last:
            return
        best = next((c for c in by_score(checkpoints, self.best) if c in spared or self._is_valid(c)), None)
        kept = {checkpoint.uri for checkpoint in (*spared, *([best] if best else []))}
        for checkpoint in checkpoints:
            if checkpoint.uri not in kept:
                remove(checkpoint)

    def _is_valid(self, checkpoint: Checkpoint) -> bool:
        """Whether the files are those that were committed, now: others are removed because of it.

        Local files are read every time. A store never changes the content of an object without changing its ETag, so
        its objects are read once, and those that this attempt wrote are not read at all."""
        if not storage.is_remote(checkpoint.uri):
            return checkpoint.uri == self.newest or damage(checkpoint) is None
        stamps = _stamps(checkpoint.uri)
        if self.verified.get(checkpoint.uri) != stamps:
            if damage(checkpoint) is not None:
                return False
            self.verified[checkpoint.uri] = stamps
        return True


def _stamps(uri: str) -> frozenset[tuple[str, int, str]]:
    """Path, size and ETag of every file of a checkpoint."""
    return frozenset((file.path, file.size, file.stamp) for file in storage.list_files(uri))


def _plain(error: Exception) -> UserError:
    """A storage error as an exception that can be sent to other workers."""
    text = str(error)
    full = getattr(error, "errno", None) in FULL or any(f"os error {code})" in text for code in FULL)
    return StorageFull(text) if full else Unavailable(text)


def _put_tensors(target: str, name: str, tensors: dict[str, Tensor], metadata: dict | None = None) -> dict[str, dict]:
    """Writes a safetensors file and returns {name: {size, sha256}}."""
    uri = storage.join(target, name)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        local = uri if not storage.is_remote(uri) else os.path.join(scratch, "file")
        os.makedirs(os.path.dirname(local), exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, local, metadata)
        receipt = {name: {"size": os.path.getsize(local), "sha256": sha256(local)}}
        if local != uri:
            storage.copy_file(local, uri)
    return receipt


# ---------------------------------------------------------------- reading


class StateReader:
    """Reads the training state of a checkpoint by parameter name, independent of how it was sliced.

    files: paths of the state files under `uri`. A remote file is copied to a temporary folder when one of its slices is
    read for the first time, so workers only download the files they need."""

    def __init__(self, uri: str, files: list[str]):
        self.scratch = tempfile.mkdtemp(prefix="checkpoint-") if storage.is_remote(uri) else None
        self.open: dict[str, Any] = {}
        self.slices: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        """(kind, parameter) -> [(start, end, file, key)], in order."""
        paths = [storage.join(uri, name) for name in files if name.startswith("state/")]
        with ThreadPoolExecutor(THREADS) as pool:
            for path, shapes in zip(paths, pool.map(_shapes, paths), strict=True):
                for key, shape in shapes.items():
                    kind, name, start = key.split(":")
                    fragment = (int(start), int(start) + shape[0], path, key)
                    self.slices.setdefault((kind, name), []).append(fragment)
        for fragments in self.slices.values():
            fragments.sort()
        self.kinds = {kind for kind, _ in self.slices}

    def _file(self, path: str) -> Any:
        if path not in self.open:
            local = path
            if self.scratch:
                local = os.path.join(self.scratch, os.path.basename(path))
                storage.copy_file(path, local)
            self.open[path] = safe_open(local, framework="pt")
        return self.open[path]

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the state of a parameter. Raises UserError when some are missing."""
        result = torch.empty(numel)
        filled = 0
        for begin, end, path, key in self.slices.get((kind, name), []):
            low, high = max(begin, start), min(end, start + numel)
            if low < high:
                values = self._file(path).get_slice(key)[low - begin : high - begin]
                result[low - start : high - start] = values
                filled += high - low
        if filled != numel:
            raise UserError(
                f"the checkpoint has {filled} of {numel} values of {kind} {name}; has the architecture changed?"
            )
        return result

    def assemble(self, kind: str) -> dict[str, Tensor]:
        """All parameters of one kind as flat tensors."""
        names = [name for k, name in self.slices if k == kind]
        return {name: self.read(kind, name, 0, max(end for _, end, *_ in self.slices[kind, name])) for name in names}

    def __enter__(self) -> "StateReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.slices.clear()
        self.open.clear()
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _shapes(path: str) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file. The first 8 bytes are the length of the JSON header."""
    length = int.from_bytes(storage.read_bytes(path, 0, 8), "little")
    header = json.loads(storage.read_bytes(path, 8, 8 + length))
    return {key: about["shape"] for key, about in header.items() if key != "__metadata__"}
