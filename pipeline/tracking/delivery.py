"""Sends the records of a spool to MLflow in batches and in order, and repeats them until the server has them.

A record that the server refuses is moved to rejected.jsonl with the reason, so that it is not lost and does not block
the others. If a run was deleted, its records stay in their queues and are delivered after the run is restored.
"""

import contextlib
import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.tracking import names, server
from pipeline.tracking.description import replace_paragraph
from pipeline.tracking.records import ENTITIES, INVALID, Entity, check_artifact, check_end, entities_of
from pipeline.tracking.server import RunUnavailableError
from pipeline.tracking.spool import Spool, find_spools, offline_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

BATCH = 1000  # entities in one log_batch request (MLflow's limit)
BATCH_OF_KIND = 100  # parameters, and tags, in one request
DATASET_ATTEMPTS = 3  # of a dataset that the server refuses
MADE_FROM = "Made from:"
ENDED = ("**Failed:**", "**Stopped:**")  # beginnings of the paragraph with the reason


class Delivery:
    """Sends the records of one spool to the server. Each queue must be used by one thread only.

    fill_gaps: send only the points whose steps the run does not have yet. live: whether the process of the run
    delivers, so that the run is marked as running.
    """

    def __init__(self, spool: Spool, *, fill_gaps: bool, live: bool = True):
        self.spool, self.fill_gaps, self.live = spool, fill_gaps, live
        self.run_id: str | None = None
        self.experiment = ""
        self.started = 0.0  # start time on the server, in seconds since the epoch
        self.costs: dict[str, float] = {}  # costs of earlier attempts
        self._known: dict[str, dict[int, float]] = {}
        self._lock = threading.RLock()

    @property
    def uri(self) -> str:
        return self.spool.header["uri"]

    @property
    def client(self) -> "MlflowClient":
        return server.client(self.uri)

    # -------- the run

    def resolve(self) -> str:
        """The server's id of the run, which is created if it does not exist. Safe to repeat after any failure."""
        with self._lock:
            if self.run_id:
                return self.run_id
            header = self.spool.header
            wanted = header["run_id"]
            if wanted:
                _deliver_earlier(wanted)
            run_id = server.find_run(self.uri, wanted) if wanted else None
            lost = wanted if run_id is None and header.get("connected") else None
            if lost and server.lifecycle_stage(self.uri, lost) == "deleted":
                # It may have some of these records: in another run they would be there twice after it is restored.
                raise RunUnavailableError(f"run {lost} was deleted; restore it in MLflow")
            if run_id is None:
                self.experiment = server.experiment_id(self.uri, header["experiment"])
                run_id = self._create(wanted)
            run = self.client.get_run(run_id)
            self.experiment = run.info.experiment_id
            self.started = run.info.start_time / 1000
            self.costs = {key: value for key, value in run.data.metrics.items() if key.startswith(names.COST)}
            header["run_id"] = run_id
            header["connected"] = True
            self.spool.save_header()
            self.run_id = run_id
            return run_id

    def _create(self, wanted: str | None) -> str:
        header = self.spool.header
        spool_tag = wanted if wanted and wanted.startswith("offline-") else offline_id(self.spool.id)
        tags = {**header["tags"], names.SPOOL: spool_tag}
        if wanted and wanted != spool_tag:
            logger.warning("run %s does not exist on %s; starting a new run", wanted, redacted(self.uri))
            tags["resumed.from"] = wanted
        if header["parent_id"]:
            parent = server.find_run(self.uri, header["parent_id"])
            if parent is None:
                raise RunUnavailableError(f"the parent run {header['parent_id']} is not on the server")
            tags[names.PARENT] = parent
        # If the response to the creation was lost, the run must not be created again.
        if header.get("tried") and (found := server.find_run(self.uri, spool_tag)):
            return found
        header["tried"] = True
        self.spool.save_header()
        made = self.client.create_run(self.experiment, header["start_time"], tags=tags, run_name=header["name"])
        run_id = made.info.run_id
        if header.get("described"):
            self.client.set_tag(run_id, names.RUN_NAME, f"{header['name']} · {run_id[:4]}")
        return run_id

    def _require_run(self) -> None:
        """Raises RunUnavailableError if the run was deleted, since the server then refuses all records."""
        if server.find_run(self.uri, self.resolve()) is None:
            raise RunUnavailableError(f"run {self.run_id} or its experiment was deleted; restore it in MLflow")

    # -------- queues

    def send_metrics(self) -> bool:
        """Sends one portion of the metrics queue; returns False if the queue is empty.
        Raises the errors of server and network."""
        records = self.spool.metrics.read(BATCH)
        if not records:
            return False
        self.resolve()
        entities: list[Entity] = []
        for record in records:
            if record.get("kind") in ENTITIES:
                self._guarded(record, functools.partial(self._collect, entities))
                continue
            self._send(entities)
            entities = []
            self._guarded(record, self._send_record)
        self._send(entities)
        self.spool.metrics.commit()
        return True

    def send_artifacts(self) -> bool:
        """Sends one artifact; returns False if there is none. Raises the errors of server and network."""
        records = self.spool.artifacts.read(1)
        if not records:
            return False
        self.resolve()
        self._guarded(records[0], self._send_artifact)
        self.spool.artifacts.commit()
        return True

    def _guarded(self, record: dict, send: Callable[[dict], None]) -> None:
        """Sends a record, or moves it to rejected.jsonl if the server refuses it or it is no record."""
        from mlflow.exceptions import MlflowException

        try:
            if record.get("kind") == "unreadable":
                raise ValueError("the line was damaged on disk")
            send(record)
        except MlflowException as error:
            if error.error_code not in (*server.REFUSALS, "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"):
                raise
            self._require_run()
            self._reject(record, error)
        except OSError:
            raise
        except KeyError as error:
            self._reject(record, ValueError(f"the record has no {error}"))
        except (UserError, *INVALID) as error:
            self._reject(record, error)

    def _reject(self, record: dict, error: Exception) -> None:
        logger.warning("%s refused %s: %s", redacted(self.uri), _description(record), redacted(str(error)[:300]))
        self.spool.reject(record, redacted(str(error)[:1000]))

    # -------- metrics, parameters and tags

    def _collect(self, entities: list[Entity], record: dict) -> None:
        """Adds the entities of a record: all of them, or none."""
        entities += self._entities(record)

    def _entities(self, record: dict) -> list[Entity]:
        return [entity for entity in entities_of(record) if entity.kind != "metrics" or self._is_new(entity)]

    def _is_new(self, point: Entity) -> bool:
        """Whether the run does not have this point. At step 0 (summaries) a changed value is also new."""
        if not self.fill_gaps:
            return True
        if point.key not in self._known:
            history = self.client.get_metric_history(self.resolve(), point.key)
            self._known[point.key] = {metric.step: metric.value for metric in history}
        known = self._known[point.key]
        return point.step not in known or (point.step == 0 and known[point.step] != point.value)

    def _send(self, entities: Sequence[Entity]) -> None:
        for portion in _portions(entities):
            self._send_portion(portion)

    def _send_portion(self, entities: Sequence[Entity]) -> None:
        """Sends entities with log_batch. A portion that the server refuses is halved
        until the refused entity is found."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        metrics = [Metric(e.key, e.value, e.time, e.step) for e in entities if e.kind == "metrics"]
        params = [Param(e.key, e.value) for e in entities if e.kind == "params"]
        tags = [RunTag(e.key, e.value) for e in entities if e.kind == "tags"]
        try:
            self.client.log_batch(self.resolve(), metrics, params, tags)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self._require_run()
            if error.error_code not in server.REFUSALS:
                raise
            self._require_run()
            self._send_halves(entities, error)
        except INVALID as error:  # of MLflow's client, which does not check everything
            self._send_halves(entities, error)

    def _send_halves(self, entities: Sequence[Entity], error: Exception) -> None:
        """Sends the halves of a refused portion; rejects a single entity."""
        if len(entities) > 1:
            self._send_portion(entities[: len(entities) // 2])
            self._send_portion(entities[len(entities) // 2 :])
        else:
            (refused,) = entities
            record = {"kind": refused.kind, "values": {refused.key: refused.value}}
            self._reject(record | {"time": refused.time, "step": refused.step}, error)

    def _set_tags(self, tags: dict[str, str]) -> None:
        self._send([Entity("tags", key, value) for key, value in tags.items()])

    # -------- other records

    def _send_record(self, record: dict) -> None:
        kind = record["kind"]
        if kind == "end":
            check_end(record["status"], record["time"], record.get("reason", ""))
            self._end(record["status"], record["time"], record.get("reason", ""))
        elif kind == "resume":
            self._resume(record["params"])
        elif kind == "paragraph":
            self._set_tags({names.NOTE: self._note(record["markers"], record["text"])})
        elif kind == "dataset":
            self._send_dataset(record["dataset"], record["role"])
        elif kind == "link":
            source = record["run_id"] if "run_id" in record else self._maker(record["digest"])
            if source:
                self._link(record["role"], source)
        else:
            raise ValueError(f'unknown kind of record "{kind}"')

    def _send_dataset(self, dataset: dict[str, str], role: str) -> None:
        """Adds an input to the run. MLflow refuses a dataset that another run of the experiment adds in the same moment;
        the next attempt finds it there."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        given = DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", role)])
        for left in reversed(range(DATASET_ATTEMPTS)):
            try:
                self.client.log_inputs(self.resolve(), [given])
                return
            except MlflowException as error:
                if not left or error.error_code not in server.REFUSALS:
                    raise

    def _end(self, status: str, time_ms: int, reason: str) -> None:
        run_id = self.resolve()
        if reason:
            word = ENDED[1] if status == "KILLED" else ENDED[0]
            self._set_tags({names.REASON: reason, names.NOTE: self._note(ENDED, f"{word} {reason}", first=True)})
        self.client.set_terminated(run_id, status, time_ms)

    def _note(self, markers: Sequence[str], paragraph: str, first: bool = False) -> str:
        """The description of the run with one paragraph replaced (`description.replace_paragraph`)."""
        text = self.client.get_run(self.resolve()).data.tags.get(names.NOTE, "")
        return replace_paragraph(text, markers, paragraph, first)

    def _resume(self, params: dict[str, str]) -> None:
        """Marks the run as running again. Parameters with changed values become a tag,
        since MLflow does not change parameters."""
        run_id = self.resolve()
        run = self.client.get_run(run_id)
        logged = run.data.params
        changed = [
            f"{key}: {logged[key]} -> {value}" for key, value in params.items() if logged.get(key, value) != value
        ]
        tags = {names.RESUMED: str(int(run.data.tags.get(names.RESUMED, 0)) + 1)}
        if changed:
            tags[names.CHANGED] = names.valid_value("; ".join(changed))
        if names.REASON in run.data.tags:
            self.client.delete_tag(run_id, names.REASON)
            tags[names.NOTE] = self._note(ENDED, "")
        new = {key: value for key, value in params.items() if key not in logged}
        self._send([Entity("params", key, value) for key, value in new.items()])
        self._set_tags(tags)
        if self.live:
            self.client.update_run(run_id, status="RUNNING")

    def _maker(self, digest: str) -> str | None:
        """The id of the newest prepare run whose dataset has this fingerprint, or None."""
        experiment = self.client.get_experiment_by_name(names.PREPARE)
        if experiment is None or not digest.isalnum():
            return None
        found = self.client.search_runs([experiment.experiment_id], f"dataset.digest = '{digest}'", max_results=1)
        return found[0].info.run_id if found else None

    def _link(self, role: str, run_id: str) -> None:
        """Sets lineage.<role> tags for the source run and its own sources, and adds links to the description."""
        found = server.find_run(self.uri, run_id)
        if found is None:
            self._set_tags({names.LINEAGE + role: f"{run_id} (not on this server)"})
            return
        lineage = {names.LINEAGE + role: found}
        for run in (found, self.resolve()):
            tags = self.client.get_run(run).data.tags
            lineage = {key: value for key, value in tags.items() if key.startswith(names.LINEAGE)} | lineage
        lines = [MADE_FROM]
        for key in sorted(lineage):
            with contextlib.suppress(Exception):  # a source that was deleted is not linked
                info = self.client.get_run(lineage[key]).info
                link = f"#/experiments/{info.experiment_id}/runs/{info.run_id}"
                lines.append(f"- {key.removeprefix(names.LINEAGE)}: [{info.run_name}]({link})")
        self._set_tags({**lineage, names.NOTE: self._note([MADE_FROM], "\n".join(lines))})

    def _send_artifact(self, record: dict) -> None:
        check_artifact(record["path"], record["file"])
        source = os.path.join(self.spool.folder, "files", os.path.basename(record["file"]))
        if not os.path.exists(source):  # delivered before a crash that prevented the commit
            return
        if not os.path.isfile(source):
            raise ValueError(f"{source} is not a regular file")
        folder, name = os.path.split(record["path"])
        named = os.path.join(f"{source}.d", name)  # MLflow uses the file name on disk
        os.makedirs(os.path.dirname(named), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(source, named)
        self.client.log_artifact(self.resolve(), named, folder or None)
        shutil.rmtree(os.path.dirname(named), ignore_errors=True)
        os.remove(source)


def _portions(entities: Sequence[Entity]) -> Iterator[list[Entity]]:
    """Divides entities into portions that MLflow accepts in one request, in order."""
    portion: list[Entity] = []
    counts = dict.fromkeys(("params", "tags"), 0)
    for entity in entities:
        if len(portion) == BATCH or counts.get(entity.kind, 0) == BATCH_OF_KIND:
            yield portion
            portion, counts = [], dict.fromkeys(counts, 0)
        portion.append(entity)
        if entity.kind in counts:
            counts[entity.kind] += 1
    if portion:
        yield portion


def _description(record: dict) -> str:
    """A short description of a record, such as "metrics train/loss"."""
    subject = ", ".join(record["values"]) if isinstance(record.get("values"), dict) else record.get("path", "")
    return f"{record.get('kind')} {subject}".strip()


# ---------------------------------------------------------------- spools whose writer has ended


@dataclass(frozen=True, slots=True)
class UploadResult:
    """The result of delivering an abandoned spool: how many records were delivered, and how many remain and why."""

    delivered: int
    left: int
    reasons: tuple[str, ...] = ()
    """The reason for each refused record."""
    error: str = ""
    """Why the other records could not be sent; empty if the server responded."""


def deliver_abandoned(spool: Spool) -> UploadResult:
    """Delivers an abandoned spool in this thread, including records that were refused before, and closes it."""
    spool.requeue_rejected()
    total, error = spool.pending, ""
    delivery = Delivery(spool, fill_gaps=True, live=False)
    try:
        delivery.resolve()
        while delivery.send_metrics() or delivery.send_artifacts():
            pass
    except Exception as cause:  # an unreachable server must not prevent the delivery to other servers
        error = server.first_line(cause)
        logger.debug("upload of %s", spool.folder, exc_info=True)
    left = spool.pending + spool.rejected
    reasons = tuple(f"{_description(record)}: {record.get('reason', '')}" for record in spool.read_rejected())
    spool.close()
    return UploadResult(max(0, total - left), left, reasons, error)


def _deliver_earlier(run_id: str) -> None:
    """Delivers the records of an earlier, killed attempt of the run. Raises
    ConnectionError if the server is unreachable."""
    for spool in find_spools(run_id).abandoned:
        done = deliver_abandoned(spool)
        if (
            done.error
            and server.RunUnavailableError.__name__ not in done.error
            and UserError.__name__ not in done.error
        ):
            raise ConnectionError(done.error)


def deliver_all(spools: Iterable[Spool]) -> Iterator[tuple[Spool, UploadResult]]:
    """Delivers spools. Parents come first, because a child run needs its parent on the server."""
    for spool in sorted(spools, key=lambda spool: spool.header["parent_id"] is not None):
        yield spool, deliver_abandoned(spool)
