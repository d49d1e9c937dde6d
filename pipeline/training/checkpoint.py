"""Checkpoints that are complete or invisible, for any number of workers.

    <run>/checkpoints/step-00001000/
        model.safetensors, config.json     the model, loadable without anything of ours (float32)
        average.safetensors                its Polyak average, when the run keeps one
        state/rank-00000-of-00002.safetensors ...   every worker's slices: "kind:parameter:start" -> 1-D float32
        COMMIT.json                        written last: sizes and SHA-256 of all of the above; without it, no checkpoint

A worker writes only what it owns, in the background (`Writer`); the model file is put together from the slices. A reader
takes the slices it needs, whatever the number of workers or ZeRO stage that wrote them (`StateReader`).
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from pipeline import storage
from pipeline.errors import UserError

COMMIT = "COMMIT.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint: its folder, its step, and what COMMIT.json says."""

    uri: str
    step: int
    commit: dict[str, Any]


# ---------------------------------------------------------------- finding


def folder(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def find(run: str) -> list[Checkpoint]:
    """The committed checkpoints of a run, oldest first. Uncommitted folders do not exist for this function."""
    root = storage.join(run, "checkpoints")
    found = []
    for file in storage.list_files(root):
        name, _, rest = file.path.partition("/")
        if rest == COMMIT and name.startswith("step-"):
            uri = storage.join(root, name)
            try:
                commit = storage.read_json(file.uri)
                found.append(Checkpoint(uri, int(commit["step"]), commit))
            except (UserError, KeyError, TypeError, ValueError) as error:
                print(f"warning: {uri} is skipped: its {COMMIT} cannot be read ({error})", flush=True)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def damage(checkpoint: Checkpoint, checksums: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Sizes are always compared, contents when `checksums`."""
    present = {file.path: file.size for file in storage.list_files(checkpoint.uri)}
    for path, expected in checkpoint.commit["files"].items():
        if path not in present:
            return f"{path} is missing"
        if present[path] != expected["size"]:
            return f"{path} has {present[path]} bytes instead of {expected['size']}"
        if checksums and _sha256(storage.join(checkpoint.uri, path)) != expected["sha256"]:
            return f"{path} does not have the content that was written"
    return None


def latest(run: str, checksums: bool = True) -> Checkpoint | None:
    """The newest checkpoint whose files are all as written; a damaged one is skipped with a warning for the one before."""
    for checkpoint in reversed(find(run)):
        problem = damage(checkpoint, checksums)
        if problem is None:
            return checkpoint
        print(f"warning: {checkpoint.uri} is skipped: {problem}", flush=True)
    return None


def resolve(uri: str) -> Checkpoint:
    """The checkpoint that a user means: a checkpoint folder, or a run folder (then its newest one).

    Raises UserError when there is no complete checkpoint there.
    """
    uri = storage.normalise(uri)
    if storage.exists(storage.join(uri, COMMIT)):
        commit = storage.read_json(storage.join(uri, COMMIT))
        checkpoint = Checkpoint(uri, int(commit["step"]), commit)
        problem = damage(checkpoint, checksums=False)
        if problem:
            raise UserError(f"{uri}: damaged checkpoint: {problem}; use the one before")
        return checkpoint
    newest = latest(uri, checksums=False)
    if newest is None:
        raise UserError(
            f"{uri}: no complete checkpoint here (a folder with {COMMIT}, or a run folder with checkpoints/)"
        )
    return newest


def remove(checkpoint: Checkpoint) -> None:
    """Deletes a checkpoint; its commit goes first, so that it is never half a checkpoint."""
    storage.remove(storage.join(checkpoint.uri, COMMIT))
    storage.remove(checkpoint.uri, recursive=True)


def remove_orphans(run: str) -> list[str]:
    """Deletes the folders that an ended attempt left without COMMIT.json. Only before training starts, by one worker."""
    root = storage.join(run, "checkpoints")
    files = storage.list_files(root)
    committed = {file.path.split("/")[0] for file in files if file.path.endswith("/" + COMMIT)}
    orphans = sorted({file.path.split("/")[0] for file in files} - committed)
    for name in orphans:
        storage.remove(storage.join(root, name), recursive=True)
    return orphans


# ---------------------------------------------------------------- writing


class Writer:
    """Writes one worker's part in the background; rank 0 adds the model and commits when every part has arrived.

    Every rank makes one and calls `save` for the same steps.
    """

    def __init__(self, run: str, model: nn.Module, *, keep: int, best: str | None = None):
        """model: as built, before DeepSpeed takes its parameters apart (its shapes, buffers and config are noted)."""
        self.run, self.keep, self.best = run, keep, best
        self.model_config: dict[str, Any] = cast(Any, model).config
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.buffers = {k: v.clone() for k, v in model.state_dict().items() if k not in self.shapes}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        # A group of its own: its collectives run in this thread, beside those of training.
        self.group = dist.new_group(backend="gloo") if self.world > 1 else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        self.waited = 0.0
        """Seconds the training loop has waited for a checkpoint still being written."""

    def save(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Starts writing a snapshot (`Engine.snapshot`). Waits first for the one before, if that is still under way."""
        self.wait()
        self.pending = self.thread.submit(self._write, step, tensors, about)

    def wait(self) -> None:
        """Until the last save is committed. Raises what went wrong with it."""
        if self.pending is not None:
            start = time.perf_counter()
            pending, self.pending = self.pending, None
            pending.result()
            self.waited += time.perf_counter() - start

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()

    def _write(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        target = folder(self.run, step)
        name = f"state/rank-{self.rank:05d}-of-{self.world:05d}.safetensors"
        receipt = _put_tensors(target, name, tensors)
        receipts = [receipt] * self.world
        if self.group is not None:
            dist.all_gather_object(receipts, receipt, group=self.group)
        if self.rank == 0:
            files = {path: info for receipt in receipts for path, info in receipt.items()}
            self._commit(target, step, files, about)
        if self.group is not None:
            dist.barrier(self.group)  # a save is over for all or for none

    def _commit(self, target: str, step: int, files: dict[str, dict], about: dict[str, Any]) -> None:
        with StateReader(target, list(files)) as reader:
            for kind, name in (("param", "model.safetensors"), ("average", "average.safetensors")):
                if kind in reader.kinds:
                    weights = {k: flat.reshape(self.shapes[k]) for k, flat in reader.assemble(kind).items()}
                    files.update(_put_tensors(target, name, {**weights, **self.buffers}, {"format": "pt"}))
        config = json.dumps({"model": self.model_config, **about.get("config", {})}, indent=1).encode()
        storage.write_bytes(storage.join(target, "config.json"), config)
        files["config.json"] = {"size": len(config), "sha256": hashlib.sha256(config).hexdigest()}
        commit = {k: v for k, v in about.items() if k != "config"}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        storage.write_json(
            storage.join(target, COMMIT),
            {"step": step, "created": created, "workers": self.world, **commit, "files": files},
        )
        self._retain()

    def _retain(self) -> None:
        """Keeps the last `keep` checkpoints and the best by metric `best`."""
        checkpoints = find(self.run)
        spared = {checkpoint.uri for checkpoint in checkpoints[-self.keep :]}
        if self.best:
            scored = [c for c in checkpoints if isinstance(c.commit.get("metrics", {}).get(self.best), (int, float))]
            if scored:
                spared.add(max(scored, key=lambda c: (c.commit["metrics"][self.best], c.step)).uri)
        for checkpoint in checkpoints:
            if checkpoint.uri not in spared:
                remove(checkpoint)


def _put_tensors(target: str, name: str, tensors: dict[str, Tensor], metadata: dict | None = None) -> dict[str, dict]:
    """Writes a safetensors file and returns its receipt {name: {size, sha256}}."""
    uri = storage.join(target, name)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        local = uri if not storage.is_remote(uri) else os.path.join(scratch, "file")
        os.makedirs(os.path.dirname(local), exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, local, metadata)
        receipt = {name: {"size": os.path.getsize(local), "sha256": _sha256(local)}}
        if local != uri:
            storage.copy_file(local, uri)
    return receipt


def _sha256(uri: str) -> str:
    digest = hashlib.sha256()
    with storage.open_file(uri) as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- reading


class StateReader:
    """The training state of a checkpoint as one space of named parameters, whoever wrote which slice.

    files: paths under `uri` of the state files. Remote files are copied to a temporary folder first.
    """

    def __init__(self, uri: str, files: list[str]):
        self.scratch: str | None = None
        paths = [storage.join(uri, name) for name in files if name.startswith("state/")]
        if storage.is_remote(uri):
            self.scratch = tempfile.mkdtemp(prefix="checkpoint-")
            local = [os.path.join(self.scratch, os.path.basename(path)) for path in paths]
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(storage.copy_file, paths, local))
            paths = local
        self.files = [safe_open(path, framework="pt") for path in paths]
        self.slices: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        """(kind, parameter) -> [(start, end, handle)], in order."""
        for file in self.files:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                kind, name, start = key.split(":")
                handle = file.get_slice(key)
                begin = int(start)
                self.slices.setdefault((kind, name), []).append((begin, begin + handle.get_shape()[0], handle))
        for pieces in self.slices.values():
            pieces.sort(key=lambda piece: piece[0])
        self.kinds = {kind for kind, _ in self.slices}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a parameter's state. Raises UserError when they are not all there."""
        result = torch.empty(numel)
        filled = 0
        for begin, end, handle in self.slices.get((kind, name), []):
            low, high = max(begin, start), min(end, start + numel)
            if low < high:
                result[low - start : high - start] = handle[low - begin : high - begin]
                filled += high - low
        if filled != numel:
            raise UserError(f"the checkpoint has {filled} of {numel} values of {kind} {name}: another architecture?")
        return result

    def assemble(self, kind: str) -> dict[str, Tensor]:
        """All parameters of one kind, flat."""
        names = [name for k, name in self.slices if k == kind]
        return {name: self.read(kind, name, 0, max(end for _, end, _ in self.slices[kind, name])) for name in names}

    def __enter__(self) -> "StateReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.slices.clear()
        self.files.clear()
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)
