"""state.json in the pipeline's output: what is done and from what, what runs, what failed.

Written by the one runner that holds the pipeline, whole or not at all. Without it nothing is lost but times and costs: the
outputs stay, and every job finds that its own is finished.
"""

import json
import time
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.graph.places import Content

FORMAT = 1
FOLDER = "_pipeline"
KEPT = 10
"""Versions of a stage that are remembered."""


@dataclass(kw_only=True, slots=True)
class Version:
    """One finished run of an instance."""

    identity: str
    """Of config, inputs and formats: what decided the output."""
    about: dict[str, Any]
    """The same, readable: {"config": {...}, "inputs": {...}, "formats": {...}}."""
    output: str
    """Where, relative to the pipeline's output when it lies there."""
    marker: str = ""
    """The file whose presence says that the output is complete."""
    fingerprint: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    """seconds, attempts, cpu_hours, gpu_hours, read, written, dollars."""
    finished: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    """What the job reports: images, losses, scores."""
    run_id: str = ""
    """Of MLflow."""

    @property
    def content(self) -> Content:
        """What the output holds."""
        return Content(self.fingerprint, self.parts)


@dataclass(kw_only=True, slots=True)
class Running:
    """An attempt that was started and whose end nobody has seen."""

    identity: str
    about: dict[str, Any]
    output: str
    job: str
    """The executor's name of the attempt: a Ray submission id, or the folder of a process."""
    attempt: int = 1
    started: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds, CPU-hours, ... of earlier attempts."""
    log: str = ""


@dataclass(kw_only=True, slots=True)
class Failed:
    """The last attempt, when it failed for good or was stopped."""

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
    """All that is known of one instance."""

    versions: list[Version] = field(default_factory=list)
    running: Running | None = None
    failed: Failed | None = None

    def version(self, identity: str) -> Version | None:
        """The finished run with this identity."""
        return next((v for v in reversed(self.versions) if v.identity == identity), None)

    def add(self, version: Version) -> None:
        """Remembers a finished run as the newest."""
        others = [v for v in self.versions if v.identity != version.identity]
        self.versions = [*others[-KEPT + 1 :], version]
        self.running = self.failed = None


@dataclass(kw_only=True, slots=True)
class State:
    """The content of state.json."""

    root: str
    records: dict[str, Record] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    """What `places.Places` remembers of raw files."""
    run: dict[str, Any] = field(default_factory=dict)
    """The unfinished run of the pipeline: {"id": ours, "run_id": MLflow's, "started": ...}; empty between runs."""

    @property
    def uri(self) -> str:
        """Where state.json is."""
        return storage.join(self.root, FOLDER, "state.json")

    def record(self, name: str) -> Record:
        """The record of an instance, new when there is none."""
        return self.records.setdefault(name, Record())

    def address(self, output: str) -> str:
        """The absolute address of a version's output."""
        return output if output.startswith("/") or "://" in output else storage.join(self.root, output)

    def relative(self, output: str) -> str:
        """An output as it is remembered: a pipeline that is moved as a whole keeps what it has done."""
        return output.removeprefix(self.root + "/")

    def save(self) -> None:
        """Writes state.json, whole or not at all."""
        plain = {"format": FORMAT, "written": time.time(), "run": self.run, "sources": self.sources}
        plain["stages"] = self.records
        storage.write_bytes(self.uri, (json.dumps(plain, default=_plain) + "\n").encode())


def load(root: str) -> State:
    """The state of the pipeline whose output is `root`; a new one when there is none.

    Raises UserError for a file of another version or of something else.
    """
    state = State(root=root)
    if not storage.exists(state.uri):
        return state
    plain = storage.read_json(state.uri)
    if not isinstance(plain, dict) or not isinstance(plain.get("stages"), dict):
        raise UserError(f"{state.uri} is not the state of a pipeline; remove it, and finished outputs are found again")
    if plain.get("format") != FORMAT:
        raise UserError(
            f"{state.uri}: its format is {plain.get('format')}, this program reads {FORMAT}: use the version that wrote it"
        )
    try:
        state.records = {name: _record(values) for name, values in plain["stages"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{state.uri}: damaged ({error}); remove it, and finished outputs are found again") from error
    state.sources, state.run = dict(plain.get("sources") or {}), dict(plain.get("run") or {})
    return state


def _plain(record: Any) -> dict[str, Any]:
    """The fields of a dataclass without a deep copy, which would take most of the time of a pipeline of 1,000 stages."""
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _record(values: dict[str, Any]) -> Record:
    return Record(
        versions=[_make(Version, version) for version in values["versions"]],
        running=_make(Running, values["running"]) if values.get("running") else None,
        failed=_make(Failed, values["failed"]) if values.get("failed") else None,
    )


def _make(cls: Any, values: dict[str, Any]) -> Any:
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
