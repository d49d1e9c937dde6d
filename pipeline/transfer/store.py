"""The output folder of a suite.

<output>/run.json                       suite, checkpoint, and the protocol and datasets of each task
<output>/results/<task>/<job>.json      the result of a job, with a checksum
<output>/predictions/<task>/<job>.parquet
<output>/failures/<task>/<job>.json     the error of a job that failed last time
<output>/features/                      feature sets of frozen models (features.py)
<output>/classes/<task>.csv             images and top-1 of each class, for the first seed
<output>/report.md, scores.json, *.png
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline import storage
from pipeline.config import fingerprint, to_dict
from pipeline.errors import StorageError, UserError
from pipeline.lease import LAUNCH
from pipeline.outputs import check_output
from pipeline.transfer.jobs import Job, Result
from pipeline.transfer.predictions import Hits, Predictions, unpack_hits, unpack_predictions
from pipeline.transfer.protocols import Split, TransferTask

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

IDENTITY = "run.json"
logger = logging.getLogger(__name__)


class Store:
    """Results of jobs as files, which are written atomically."""

    def __init__(self, output: str) -> None:
        self.output = output

    def _uri(self, kind: str, job: Job, ending: str) -> str:
        return storage.join(self.output, kind, f"{job.name}.{ending}")

    def load_all(self) -> dict[str, Result]:
        """All results by job name. A damaged file is logged and skipped, so that its job runs again."""
        folder = storage.join(self.output, "results")
        names = {f.name for f in fields(Result)}
        found = {}
        for file in storage.list_files(folder):
            if file.path.endswith(".json"):
                try:
                    values = storage.read_json(file.uri)
                    checksum = values.pop("checksum", None)
                    if checksum and checksum != fingerprint(values):
                        raise UserError(f"{file.uri}: wrong checksum")
                    result = Result(**{k: v for k, v in values.items() if k in names})
                except StorageError:
                    raise
                except (UserError, TypeError, AttributeError) as error:
                    logger.warning("%s is damaged and will be computed again (%s)", file.uri, error)
                    continue
                found[file.path.removesuffix(".json")] = result
        return found

    def save(self, job: Job, result: Result, predictions: bytes | None) -> None:
        if predictions is not None:
            storage.write_bytes(self._uri("predictions", job, "parquet"), predictions)
        values = json.loads(json.dumps(asdict(result)))  # as they are read back
        storage.write_json(self._uri("results", job, "json"), {**values, "checksum": fingerprint(values)})
        storage.remove(self._uri("failures", job, "json"))

    def save_failure(self, job: Job, error: str) -> None:
        storage.write_json(self._uri("failures", job, "json"), {"job": job.name, "error": error})

    def predictions(self, job: Job) -> Predictions:
        return self._unpack(job, unpack_predictions)

    def hits(self, job: Job) -> Hits:
        """The output of a few-shot job, which has no predictions."""
        return self._unpack(job, unpack_hits)

    def _unpack(self, job: Job, unpack: Callable[[bytes], Any]) -> Any:
        """Reads predictions. Raises UserError for a missing or damaged file, and removes
        the result so that the job runs again."""
        uri = self._uri("predictions", job, "parquet")
        try:
            return unpack(storage.read_bytes(uri))
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            storage.remove(self._uri("results", job, "json"))
            raise UserError(f"{uri}: missing or damaged ({error}); run the command again to recompute it") from error


class SuiteState:
    """run.json: the content of the output folder, and the MLflow runs that record it."""

    def __init__(self, output: str, values: dict[str, Any]) -> None:
        self.output, self.values = output, values

    def save(self) -> None:
        storage.write_json(storage.join(self.output, IDENTITY), self.values)

    @property
    def run_id(self) -> str | None:
        """MLflow's parent run; None before the first start."""
        return self.values.get("run_id")

    @run_id.setter
    def run_id(self, value: str) -> None:
        self.values["run_id"] = value

    @property
    def children(self) -> dict[str, str]:
        """{task: MLflow run}"""
        return self.values["children"]

    @property
    def recorded(self) -> dict[str, int]:
        """{task: number of results in its MLflow run}"""
        return self.values["recorded"]


def open_state(
    output: str | None,
    identity: Mapping[str, str],
    checkpoint_uri: str,
    tasks: Sequence[TransferTask],
    datasets: Mapping[Split, "Dataset"],
) -> SuiteState:
    """The state of an output folder. A new folder is not written.

    identity: suite and checkpoint, which determine the default folder together with the tasks. Tasks and seeds can be
    added later. Raises UserError for a folder with results of another checkpoint,
    protocol or dataset, or with other files."""
    described = {
        task.name: {
            "protocol": to_dict(task.protocol),
            **{role: datasets[split].manifest.fingerprint for role, split in task.splits.items()},
        }
        for task in tasks
    }
    default = f"runs/{identity['suite']}/transfer-{fingerprint([dict(identity), described])[:8]}"
    output = storage.normalise(output or default)
    check_output(output)
    uri = storage.join(output, IDENTITY)
    if not storage.exists(uri):
        if any(file.path != LAUNCH for file in storage.list_files(output)):
            raise UserError(f"{output} contains other files than transfer results; choose another --output")
        new = {"checkpoint_uri": checkpoint_uri, "tasks": described, "children": {}, "recorded": {}}
        return SuiteState(output, {**identity, **new})
    state = storage.read_json(uri)
    if not isinstance(state, dict) or not all(
        isinstance(state.get(k), dict) for k in ("tasks", "children", "recorded")
    ):
        raise UserError(f"{uri}: not a valid run.json of a transfer suite; choose another --output")
    for key, value in identity.items():
        if state.get(key) != value:
            there = state.get("checkpoint_uri") if key == "checkpoint" else state.get(key)
            raise UserError(f"{output} has results of another {key} ({there}); choose another --output")
    for name, mine in described.items():
        theirs = state["tasks"].setdefault(name, mine)
        changed = [key for key in mine if theirs.get(key) != mine[key]]
        if changed:
            raise UserError(
                f"{output} has results of {name} with another {' and '.join(changed)}; choose another --output"
            )
    return SuiteState(output, state)
