"""The ledger of evaluations on shared storage: claims, failures and scores.

For suite version V and checkpoint C:

    <output>/<suite>-<V>/<C>/claim-000.json    the evaluating process, and its last heartbeat
    <output>/<suite>-<V>/<C>/failed-000.json   reason of a failed attempt
    <output>/<suite>-<V>/<C>/transfer/         resumable results of the suite
    <output>/<suite>-<V>/<C>/result.json       mean, spread, scores; written once
    <output>/<suite>-<V>/<C>/recorded.json     the result was logged to MLflow

Claims use exclusive creation, so two schedulers never evaluate the same checkpoint. A claim without a recent heartbeat
is superseded by the next number."""

import dataclasses
import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import StorageError, UserError
from pipeline.tracking import registry

logger = logging.getLogger(__name__)

LEASE = 600.0  # seconds without a heartbeat after which an evaluator is considered dead
ATTEMPTS = 3  # maximum number of failed attempts per checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A checkpoint to evaluate, from a run folder, a model version, or both."""

    key: str
    checkpoint: str
    step: int
    images_seen: int | None
    run: str
    version: registry.Version | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationScores:
    """Scores of one evaluation: top-1 in percent; spread is the standard error of the mean."""

    mean: float
    spread: float
    scores: dict[str, float]
    run_id: str | None = None


CLAIM = re.compile(r"claim-(\d{3,})\.json")


class LedgerError(RuntimeError):
    """Raised for an invalid ledger file."""


def read_record(uri: str) -> dict[str, Any]:
    """Reads a JSON object. Raises LedgerError for anything else."""
    try:
        values = storage.read_json(uri)
    except StorageError:
        raise
    except (UserError, ValueError, RecursionError) as error:
        raise LedgerError(f"{uri}: cannot be read ({error}); remove it") from error
    if not isinstance(values, dict):
        raise LedgerError(f"{uri}: not a JSON object; remove it")
    return values


class Ledger:
    """Claims, failures and results of a suite version. Methods do not cache, because other processes write to the
    ledger."""

    def __init__(self, output: str, lease: float = LEASE):
        self.output, self.lease = output, lease
        self.owner = f"{platform.node()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"

    def folder(self, target: Target) -> str:
        return storage.join(self.output, target.key)

    def result(self, target: Target) -> EvaluationScores | None:
        """The scores, or None. Raises LedgerError for an invalid file."""
        uri = storage.join(self.folder(target), "result.json")
        if not storage.exists(uri):
            return None
        values = read_record(uri)
        try:
            scores = {str(task): float(score) for task, score in values["scores"].items()}
            return EvaluationScores(
                mean=float(values["mean"]), spread=float(values["spread"]), scores=scores, run_id=values.get("run_id")
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LedgerError(f"{uri}: not the result of an evaluation; remove it to evaluate again") from error

    def failures(self, target: Target) -> int:
        return sum(file.path.startswith("failed-") for file in storage.list_files(self.folder(target), recursive=False))

    def claim(self, target: Target) -> "Claim | None":
        """Claims a checkpoint. Returns None if it is done, has failed ATTEMPTS times, or is claimed by a live
        process."""
        names_here = {file.path for file in storage.list_files(self.folder(target), recursive=False)}
        if "result.json" in names_here or self.failures(target) >= ATTEMPTS:
            return None
        numbers = sorted(int(found[1]) for name in names_here if (found := CLAIM.fullmatch(name)))
        if numbers and self._is_alive(storage.join(self.folder(target), f"claim-{numbers[-1]:03d}.json")):
            return None
        number = numbers[-1] + 1 if numbers else 0
        claim = Claim(self, target, number)
        return claim if storage.create_bytes(claim.uri, claim.text()) else None

    def _is_alive(self, claim: str) -> bool:
        """Whether the heartbeat of a claim is recent. An unreadable claim counts as dead."""
        try:
            age = time.time() - float(read_record(claim)["alive"])
        except (LedgerError, KeyError, TypeError, ValueError, OverflowError) as error:
            logger.warning("%s is not a valid claim (%s); its evaluator is considered dead", claim, error)
            return False
        return -self.lease < age < self.lease


class Claim:
    """Context manager of a claim. A thread renews the heartbeat; leaving the block releases the claim."""

    def __init__(self, ledger: Ledger, target: Target, number: int):
        self.ledger, self.target, self.number = ledger, target, number
        self.uri = storage.join(ledger.folder(target), f"claim-{number:03d}.json")
        self._done = threading.Event()

    def text(self, alive: float | None = None) -> bytes:
        return json.dumps({"owner": self.ledger.owner, "alive": time.time() if alive is None else alive}).encode()

    def __enter__(self) -> "Claim":
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._done.wait(self.ledger.lease / 5):
            try:
                storage.write_bytes(self.uri, self.text())
            except (OSError, UserError) as error:  # the next heartbeat may succeed; the lease spans several
                logger.warning("heartbeat of %s: %s", self.target.key, error)

    def finish(self, outcome: EvaluationScores) -> bool:
        """Writes the result. Returns False if another process that took over the claim has already written it."""
        uri = storage.join(self.ledger.folder(self.target), "result.json")
        return storage.create_bytes(uri, json.dumps(dataclasses.asdict(outcome), indent=1).encode())

    def fail(self, reason: str) -> None:
        uri = storage.join(self.ledger.folder(self.target), f"failed-{self.number:03d}.json")
        storage.write_json(uri, {"owner": self.ledger.owner, "time": time.time(), "reason": reason})

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        try:
            storage.write_bytes(
                self.uri, self.text(alive=0.0)
            )  # release the claim, so that others need not wait for the lease
        except StorageError as error:
            logger.warning("%s is not released, it expires after %g s: %s", self.uri, self.ledger.lease, error)
