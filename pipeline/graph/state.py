"""state.json in the output of a pipeline: finished versions and their identities, running attempts, failures.

Only the runner that holds the lease writes the file, atomically. If the file is lost, only times and costs are lost: the
outputs remain, and each job detects that its output is complete.
"""

import json
import time
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.graph.fingerprints import Content

FORMAT = 1
FOLDER = "_pipeline"
KEPT = 10
"""Number of versions of a stage in the file."""


@dataclass(kw_only=True, slots=True)
class StageVersion:
    """One finished run of an instance."""

    identity: str
    """Fingerprint of `about`."""
    about: dict[str, Any]
    """What affects the output: {"job": ..., "config": {...}, "inputs": {...}, "formats": {...}}."""
    output: str
    """URI, relative to the output of the pipeline if it is inside."""
    marker: str = ""
    """The file whose existence marks the output as complete."""
    fingerprint: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    """seconds, attempts, cpu_hours, gpu_hours, read, written, dollars."""
    finished: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    """The result of the job: images, losses, scores."""
    run_id: str = ""
    """MLflow run of the stage."""

    @property
    def content(self) -> Content:
        """Fingerprints of the output."""
        return Content(self.fingerprint, self.parts)


@dataclass(kw_only=True, slots=True)
class Running:
    """An attempt that was started and whose end is not recorded."""

    identity: str
    about: dict[str, Any]
    output: str
    job: str
    """Name of the attempt in the executor: the Ray submission id, or the folder of the process."""
    attempt: int = 1
    started: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds, CPU-hours, ... of earlier attempts."""
    log: str = ""


@dataclass(kw_only=True, slots=True)
class FailedAttempt:
    """The last attempt, if it failed or was stopped."""

    identity: str
    reason: str
    code: int | None = None
    stopped: bool = False
    attempts: int = 1
    at: float = 0.0
    log: str = ""
    spent: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Record:
    """The recorded state of one instance."""

    versions: list[StageVersion] = field(default_factory=list)
    running: Running | None = None
    failed: FailedAttempt | None = None

    def version(self, identity: str) -> StageVersion | None:
        """The finished run with this identity."""
        return next((v for v in reversed(self.versions) if v.identity == identity), None)

    def add(self, version: StageVersion) -> None:
        """Adds a finished run as the newest."""
        others = [v for v in self.versions if v.identity != version.identity]
        self.versions = [*others[-KEPT + 1 :], version]
        self.running = self.failed = None


@dataclass(kw_only=True, slots=True)
class State:
    """The content of state.json."""

    root: str
    records: dict[str, Record] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    """The cache of `fingerprints.Fingerprints` for raw files."""
    run: dict[str, Any] = field(default_factory=dict)
    """The unfinished run of the pipeline: {"id": ..., "run_id": that of MLflow, "started": ...}; empty between runs."""

    @property
    def uri(self) -> str:
        """URI of state.json."""
        return storage.join(self.root, FOLDER, "state.json")

    def record(self, name: str) -> Record:
        """The record of an instance; created if missing."""
        return self.records.setdefault(name, Record())

    def address(self, output: str) -> str:
        """The absolute URI of the output of a version."""
        return output if output.startswith("/") or "://" in output else storage.join(self.root, output)

    def relative(self, output: str) -> str:
        """The recorded form of an output URI. It is relative, so that a moved pipeline keeps its finished stages."""
        return output.removeprefix(self.root + "/")

    def save(self) -> None:
        """Writes state.json atomically."""
        plain = {"format": FORMAT, "written": time.time(), "run": self.run, "sources": self.sources}
        plain["stages"] = self.records
        storage.write_bytes(self.uri, (json.dumps(plain, default=_plain) + "\n").encode())


def load(root: str) -> State:
    """Loads the state of the pipeline with the output `root`; a new state if there is no file.

    Raises UserError for a file of another version and for invalid content.
    """
    state = State(root=root)
    if not storage.exists(state.uri):
        return state
    plain = storage.read_json(state.uri)
    if not isinstance(plain, dict) or not isinstance(plain.get("stages"), dict):
        raise UserError(
            f"{state.uri} is not the state of a pipeline; remove the file, and the jobs find their finished outputs again"
        )
    if plain.get("format") != FORMAT:
        raise UserError(
            f"{state.uri}: its format is {plain.get('format')}, and this program reads {FORMAT}; use the version that wrote it"
        )
    try:
        state.records = {name: _record(values) for name, values in plain["stages"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{state.uri}: damaged ({error}); remove the file, and the jobs find their finished outputs again"
        ) from error
    state.sources, state.run = dict(plain.get("sources") or {}), dict(plain.get("run") or {})
    return state


def _plain(record: Any) -> dict[str, Any]:
    """The fields of a dataclass without a deep copy, which would take most of the time of a pipeline of 1,000 stages."""
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _record(values: dict[str, Any]) -> Record:
    return Record(
        versions=[_make(StageVersion, version) for version in values["versions"]],
        running=_make(Running, values["running"]) if values.get("running") else None,
        failed=_make(FailedAttempt, values["failed"]) if values.get("failed") else None,
    )


def _make(cls: Any, values: dict[str, Any]) -> Any:
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
