"""Runs: what the jobs log through. Nothing here ever waits for the tracking server longer than `start_run` does.

`start_run` tries to create the run at once. When the server cannot be reached, the run starts all the same under an
`offline-…` id, everything goes to the spool (`pipeline.tracking.spool`), and two background threads deliver it, in
batches and in order, as soon as the server answers. What is still undelivered at the end stays on disk, and the end
says so and how to upload it: `python -m pipeline.tracking upload`.
"""

import contextlib
import dataclasses
import fcntl
import functools
import gc
import getpass
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config import flatten, to_dict
from pipeline.errors import UserError
from pipeline.tracking import names
from pipeline.tracking.spool import Queue, Spool, abandoned, offline_id, spool_root
from pipeline.tracking.views import experiment_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SEND_EVERY = 1.0  # seconds between deliveries while all is well
RETRY_AT_MOST = 30.0  # seconds between attempts while the server is away
BATCH = 1000  # entities in one log_batch request (MLflow's limit; of them 100 parameters and 100 tags)
VALUE = 5000  # characters of a tag or parameter value that every MLflow store accepts

# Refusals that repeating will not change; everything else (connection, 5xx, 401, 403, a locked database) is retried.
FINAL = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
}

log = logging.getLogger("pipeline.tracking")


# ---------------------------------------------------------------- which server


def tracking_uri(explicit: str | None = None) -> str:
    """The server to use: `explicit`, MLFLOW_TRACKING_URI, or SQLite in the working directory; always absolute.

    Call it on the driver and hand the result to workers: Ray workers change directory, and a relative SQLite path
    would become one database each. Raises UserError for a folder of files, which MLflow no longer supports.
    """
    uri = explicit or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if not uri:
        folder = os.getcwd()
        if "/working_dir_files/" in folder + "/":  # a submitted job's copy of the project, deleted with the job
            folder = os.path.expanduser("~")
        uri = f"sqlite:///{folder}/mlflow.db"
    if uri.startswith("sqlite:///"):
        return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(f"tracking URI {uri}: MLflow no longer records into a folder; use sqlite:///{uri}/mlflow.db")
    return uri.rstrip("/")


def redacted(uri: str) -> str:
    """The URI without a password, for humans and logs."""
    return re.sub(r"://[^/@]*@", "://***@", uri)


@functools.lru_cache(maxsize=8)
def client(uri: str) -> "MlflowClient":
    """An MLflow client with short patience: retrying is the spool's work, and it does not block anyone.

    The first use of a SQLite file creates its tables, which takes seconds and must not happen twice at once.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout belongs to the jobs
    from mlflow import MlflowClient

    # its half a million objects stay for good: a garbage collection that walks them would stop a step for long
    gc.freeze()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    path = uri.removeprefix("sqlite:///")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = MlflowClient(uri)
        made.get_experiment("0")
    return made


def experiment_id(uri: str, name: str) -> str:
    """The id of the experiment, made when it is new. SQLite keeps artifacts beside it, in mlruns/."""
    mlflow = client(uri)
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        root = f"{os.path.dirname(uri.removeprefix('sqlite:///'))}/mlruns/{name}" if uri.startswith("sqlite") else None
        try:
            made = mlflow.create_experiment(name, artifact_location=root)
            for key, value in experiment_tags(name, made).items():
                mlflow.set_experiment_tag(made, key, value)
            return made
        except Exception:  # another process was faster, or the name is truly unusable: then this raises again
            found = mlflow.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(f'MLflow experiment "{name}" was deleted; restore it or use another name')
    return found.experiment_id


def run_url(uri: str, experiment: str, run_id: str) -> str:
    """Where a person sees the run."""
    return f"{redacted(uri)}/#/experiments/{experiment}/runs/{run_id}" if uri.startswith("http") else redacted(uri)


# ---------------------------------------------------------------- delivery


class _Delivery:
    """Sends one spool's records to the server. Not thread-safe per queue: one thread sends metrics, one artifacts."""

    def __init__(self, spool: Spool, fill_gaps: bool):
        self.spool = spool
        self.fill_gaps = fill_gaps  # the run may have points already: send only steps that it lacks
        self.run_id: str | None = None
        self.experiment = ""
        self.started = 0.0  # epoch seconds, as the server has it
        self.costs: dict[str, float] = {}  # of earlier attempts
        self._known: dict[str, dict[int, float]] = {}
        self._lock = threading.RLock()

    @property
    def uri(self) -> str:
        return self.spool.header["uri"]

    def resolve(self) -> str:
        """The server's id of the run, which is created when it does not exist yet. Safe to repeat after any failure."""
        with self._lock:
            if self.run_id:
                return self.run_id
            header, mlflow = self.spool.header, client(self.uri)
            wanted = header["run_id"]
            for earlier in abandoned(wanted) if wanted else []:  # what a killed attempt still had to say goes first
                deliver_all(earlier)
            run_id = _lookup(self.uri, wanted) if wanted else None
            if run_id is None:
                self.experiment = experiment_id(self.uri, header["experiment"])
                run_id = self._create(mlflow, wanted)
            run = mlflow.get_run(run_id)
            self.experiment = run.info.experiment_id
            self.started = run.info.start_time / 1000
            self.costs = {key: value for key, value in run.data.metrics.items() if key.startswith(names.COST)}
            header["run_id"] = run_id
            self.spool.save_header()
            self.run_id = run_id
            return run_id

    def _create(self, mlflow: "MlflowClient", wanted: str | None) -> str:
        header = self.spool.header
        spool_tag = wanted if wanted and wanted.startswith("offline-") else offline_id(self.spool.id)
        tags = {**header["tags"], names.SPOOL: spool_tag}
        if wanted and wanted != spool_tag:
            log.warning("run %s is not known to %s; a new run starts", wanted, redacted(self.uri))
            tags["resumed.from"] = wanted
        if header["parent_id"]:
            parent = _lookup(self.uri, header["parent_id"])
            if parent is None:
                raise ConnectionError(f"the parent run {header['parent_id']} has not been uploaded yet")
            tags[names.PARENT] = parent
        # A creation whose answer was lost must not be made again.
        if header.get("tried") and (found := _lookup(self.uri, spool_tag)):
            return found
        header["tried"] = True
        self.spool.save_header()
        created = mlflow.create_run(self.experiment, header["start_time"], tags=tags, run_name=header["name"])
        return created.info.run_id

    # -------- records

    def send_metrics(self) -> bool:
        """Sends one portion of the metrics queue; False when it is empty. Raises what the server or network raises."""
        records = self.spool.metrics.read(BATCH)
        if not records:
            return False
        self.resolve()
        batch: list[dict] = []
        for record in records:
            if record["kind"] in ("metrics", "tags", "params"):
                batch.append(record)
                continue
            self._send_batch(batch)
            batch = []
            self._guarded(record, self._send_one)
        self._send_batch(batch)
        self.spool.metrics.commit()
        return True

    def send_artifacts(self) -> bool:
        records = self.spool.artifacts.read(1)
        if not records:
            return False
        self.resolve()
        self._guarded(records[0], self._send_artifact)
        self.spool.artifacts.commit()
        return True

    def _guarded(self, record: dict, send: Callable[[dict], None]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            send(record)
        except MlflowException as error:
            if error.error_code not in FINAL:
                raise
            log.warning("%s refused %s: %s", redacted(self.uri), record["kind"], str(error)[:300])
            self.spool.reject(record, str(error))

    def _send_batch(self, records: list[dict]) -> None:
        """log_batch in the sizes that MLflow accepts; a refused portion is halved until the bad record stands alone."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        entities: dict[str, list] = {"metrics": [], "params": [], "tags": []}
        for record in records:
            for key, value in record["values"].items():
                if record["kind"] == "metrics":
                    if self._is_new(key, record["step"], value):
                        entities["metrics"].append(Metric(key, value, record["time"], record["step"]))
                else:
                    entities[record["kind"]].append((RunTag if record["kind"] == "tags" else Param)(key, value))
        mlflow, run_id = client(self.uri), self.resolve()
        while any(entities.values()):
            portion = {kind: items[:100] for kind, items in entities.items() if kind != "metrics"}
            portion["metrics"] = entities["metrics"][: BATCH - sum(map(len, portion.values()))]
            try:
                mlflow.log_batch(run_id, portion["metrics"], portion["params"], portion["tags"])
            except MlflowException as error:
                if error.error_code not in FINAL:
                    raise
                if len(records) > 1:
                    self._send_batch(records[: len(records) // 2])
                    self._send_batch(records[len(records) // 2 :])
                else:
                    log.warning("%s refused %s: %s", redacted(self.uri), records[0]["kind"], str(error)[:300])
                    self.spool.reject(records[0], str(error))
                return
            entities = {kind: items[len(portion[kind]) :] for kind, items in entities.items()}

    def _is_new(self, key: str, step: int, value: float) -> bool:
        """Whether the run lacks this point. At step 0 (summaries) another value is news too: the newest one counts."""
        if not self.fill_gaps:
            return True
        if key not in self._known:
            history = client(self.uri).get_metric_history(self.resolve(), key)
            self._known[key] = {metric.step: metric.value for metric in history}
        known = self._known[key]
        return step not in known or (step == 0 and known[step] != value)

    def _send_one(self, record: dict) -> None:
        mlflow, run_id = client(self.uri), self.resolve()
        kind = record["kind"]
        if kind == "end":
            mlflow.set_terminated(run_id, record["status"], record["time"])
        elif kind == "resume":
            self._resume(record["params"])
        elif kind == "dataset":
            from mlflow.entities import Dataset, DatasetInput, InputTag

            role = InputTag("mlflow.data.context", record["role"])
            mlflow.log_inputs(run_id, [DatasetInput(Dataset(**record["dataset"]), [role])])
        elif kind == "link":
            source = record["run_id"] if "run_id" in record else self._maker(record["digest"])
            if source:
                self._link(record["role"], source)

    def _resume(self, params: dict[str, str]) -> None:
        """Marks another attempt: the run is running again; parameters that MLflow will not change become a tag."""
        mlflow, run_id = client(self.uri), self.resolve()
        run = mlflow.get_run(run_id)
        logged = run.data.params
        changed = [
            f"{key}: {logged[key]} -> {value}" for key, value in params.items() if logged.get(key, value) != value
        ]
        tags = {names.RESUMED: str(int(run.data.tags.get(names.RESUMED, 0)) + 1)}
        if changed:
            tags[names.CHANGED] = "; ".join(changed)[:VALUE]
        new = {key: value for key, value in params.items() if key not in logged}
        self._send_batch([{"kind": "params", "values": new}, {"kind": "tags", "values": tags}])
        mlflow.update_run(run_id, status="RUNNING")

    def _maker(self, digest: str) -> str | None:
        """The newest prepare run whose dataset has this fingerprint; None when the server has none."""
        mlflow = client(self.uri)
        experiment = mlflow.get_experiment_by_name(names.PREPARE)
        if experiment is None or not digest.isalnum():
            return None
        found = mlflow.search_runs([experiment.experiment_id], f"dataset.digest = '{digest}'", max_results=1)
        return found[0].info.run_id if found else None

    def _link(self, role: str, run_id: str) -> None:
        """lineage.<role> tags of the source run and of its own sources, and a note with links to click."""
        mlflow = client(self.uri)
        found = _lookup(self.uri, run_id)
        if found is None:
            self._send_batch([{"kind": "tags", "values": {names.LINEAGE + role: f"{run_id} (not on this server)"}}])
            return
        source = mlflow.get_run(found)
        lineage = {key: value for key, value in source.data.tags.items() if key.startswith(names.LINEAGE)}
        lineage[names.LINEAGE + role] = found
        tags = mlflow.get_run(self.resolve()).data.tags
        lineage = {key: value for key, value in tags.items() if key.startswith(names.LINEAGE)} | lineage
        lines = ["Made from:", ""]
        for key in sorted(lineage):
            with contextlib.suppress(Exception):  # a source that was deleted since is only not linked
                info = mlflow.get_run(lineage[key]).info
                link = f"#/experiments/{info.experiment_id}/runs/{info.run_id}"
                lines.append(f"- {key.removeprefix(names.LINEAGE)}: [{info.run_name}]({link})")
        self._send_batch([{"kind": "tags", "values": {**lineage, names.NOTE: "\n".join(lines)}}])

    def _send_artifact(self, record: dict) -> None:
        source = os.path.join(self.spool.folder, "files", record["file"])
        if not os.path.exists(source):  # delivered before a crash, which kept us from noting it
            return
        folder, name = os.path.split(record["path"])
        named = os.path.join(self.spool.folder, "files", record["file"] + ".d", name)  # MLflow takes the name on disk
        os.makedirs(os.path.dirname(named), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(source, named)
        client(self.uri).log_artifact(self.resolve(), named, folder or None)
        shutil.rmtree(os.path.dirname(named), ignore_errors=True)
        os.remove(source)


def _lookup(uri: str, run_id: str) -> str | None:
    """The server's id of a run given by its own id or by its offline id; None when the server has no such run."""
    from mlflow.exceptions import MlflowException

    mlflow = client(uri)
    if run_id.startswith("offline-"):
        experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
        found = mlflow.search_runs(experiments, f"tags.{names.SPOOL} = '{run_id}'", max_results=1)
        return found[0].info.run_id if found else None
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code in FINAL:
            return None
        raise
    return run_id if run.info.lifecycle_stage == "active" else None


def deliver_all(spool: Spool) -> bool:
    """Delivers an abandoned spool now, in this thread; True when nothing is left of it. Closes it either way."""
    delivery = _Delivery(spool, fill_gaps=True)
    try:
        delivery.resolve()
        while delivery.send_metrics() or delivery.send_artifacts():
            pass
    finally:
        delivered = spool.close()
    return delivered


# ---------------------------------------------------------------- the run


class Run:
    """One MLflow run, open for writing. Made by `start_run` or `attach_run`; every method returns at once."""

    def __init__(self, spool: Spool, *, fill_gaps: bool, owner: bool):
        self._spool = spool
        self._delivery = _Delivery(spool, fill_gaps)
        self._owner = owner  # only the owner ends the run
        self._nonfinite: dict[str, tuple[int, int]] = {}  # metric: (count, first step)
        self._last: dict[str, tuple[int, float]] = {}  # metric: the point logged last
        self._started = time.monotonic()
        self._finished = False
        self._closing = threading.Event()
        self._wake = threading.Condition()  # towards the pumps: deliver now
        self._progress = threading.Condition()  # from the pumps: something was delivered, or failed
        self._attempts = 0  # deliveries that failed so far
        self._threads: list[threading.Thread] = []
        self.error = ""  # of the last delivery that failed; empty while all is well

    @property
    def id(self) -> str:
        """MLflow's run id, or `offline-…` until the server has been reached; both are good for `run_id=` later."""
        return self._delivery.run_id or self._spool.header["run_id"] or offline_id(self._spool.id)

    @property
    def uri(self) -> str:
        return self._delivery.uri

    def started(self) -> float:
        """When the run began, in epoch seconds. Asks the server, and raises what that raises."""
        self._delivery.resolve()
        return self._delivery.started

    @property
    def url(self) -> str:
        return run_url(self.uri, self._delivery.experiment, self.id)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")

    # -------- what the jobs log

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Metrics of one step. NaN and infinities are counted under nonfinite/<name> and tagged, not stored."""
        values = {name: float(value) for name, value in metrics.items()}
        # MLflow's charts over another metric (images seen) pair points by position: one twice at a step shifts all after it.
        values = {name: value for name, value in values.items() if self._last.get(name) != (step, value)}
        self._last |= {name: (step, value) for name, value in values.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        for name in bad:
            del values[name]
            count, first = self._nonfinite.get(name, (0, int(step)))
            self._nonfinite[name] = (count + 1, first)
            values[names.NONFINITE + name] = count + 1
        now = int(time.time() * 1000)
        self._spool.metrics.append({"kind": "metrics", "step": int(step), "time": now, "values": values})
        if bad:
            found = (f"{name}: {count} since step {first}" for name, (count, first) in self._nonfinite.items())
            self.set_tags({names.NONFINITE_TAG: "; ".join(found)})

    def log_cost(self, costs: Mapping[str, float]) -> None:
        """Costs of this attempt (names `cost/...`); those of earlier attempts of the run are added to them."""
        self.log({name: value + self._delivery.costs.get(name, 0.0) for name, value in costs.items()})

    def log_energy(self) -> None:
        """The energy that the GPUs of all nodes have used, as far as it could be read and the server has it."""
        with contextlib.suppress(Exception):
            nodes = [
                v for k, v in self.metrics().items() if k.startswith(names.SYSTEM) and k.endswith(names.NODE_ENERGY)
            ]
            if nodes:
                self.log({names.ENERGY_KWH: sum(nodes)})

    def metrics(self) -> dict[str, float]:
        """The newest value of every metric, as the server has them. Raises what asking it raises."""
        return dict(client(self.uri).get_run(self._delivery.resolve()).data.metrics)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        values = {key: str(value)[:VALUE] for key, value in tags.items()}
        if values:
            self._spool.metrics.append({"kind": "tags", "values": values})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters beyond the configuration that `start_run` logged; nested ones are flattened to a.b.c."""
        values = {key: str(value)[:VALUE] for key, value in flatten(params).items()}
        if values:
            self._spool.metrics.append({"kind": "params", "values": values})

    def log_bytes(self, data: bytes, path: str) -> None:
        self._spool.add_artifact(path, data)

    def log_text(self, text: str, path: str) -> None:
        self.log_bytes(text.encode(), path)

    def log_dict(self, value: Any, path: str) -> None:
        """A JSON artifact, or YAML when `path` ends so."""
        yaml_wanted = path.endswith((".yaml", ".yml"))
        self.log_text(yaml.safe_dump(value, sort_keys=False) if yaml_wanted else json.dumps(value, indent=1), path)

    def log_figure(self, figure: Any, path: str) -> None:
        """A matplotlib figure, in the format that the path's ending names."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format=os.path.splitext(path)[1][1:] or "png", bbox_inches="tight")
        self.log_bytes(buffer.getvalue(), path)

    def log_dataset(self, uri: str, manifest: Mapping[str, Any], role: str = "train", made: bool = False) -> None:
        """A dataset that the run reads: an MLflow input, fingerprint tags, its manifest, and a link to its prepare run.

        made: the run is that prepare run. Others find it by the fingerprint, wherever the dataset has been copied to.
        """
        text = json.dumps(manifest, sort_keys=True, default=str)
        digest = str(manifest.get("fingerprint") or hashlib.sha256(text.encode()).hexdigest()[:12])
        rows = manifest.get("rows") or manifest.get("num_rows") or (manifest.get("totals") or {}).get("rows")
        dataset = {
            "name": os.path.basename(uri.rstrip("/")) or uri,
            "digest": digest[:36],
            "source_type": "s3" if uri.startswith("s3://") else "local",
            "source": json.dumps({"uri": uri}),
            "profile": json.dumps({"num_rows": rows}),
        }
        self._spool.metrics.append({"kind": "dataset", "role": role, "dataset": dataset})
        self.set_tags({f"{names.DATA_URI}.{role}": uri, f"{names.DATA_FINGERPRINT}.{role}": digest})
        self.log_text(text, f"data/{role}-manifest.json")
        if not made:
            self._spool.metrics.append({"kind": "link", "role": "prepare", "digest": digest[:36]})

    def link(self, role: str, run_id: str) -> None:
        """Lineage: this run was made from that one (role: prepare, pretrain, transfer), whose own sources come along."""
        self._spool.metrics.append({"kind": "link", "role": role, "run_id": run_id})

    # -------- delivery and end

    def flush(self, timeout: float = 30.0) -> bool:
        """Waits until everything logged so far is on the server; False when it is unreachable or the time is up."""
        deadline, attempts = time.monotonic() + timeout, self._attempts
        while self._spool.pending and self._attempts == attempts and time.monotonic() < deadline:
            with self._wake:
                self._wake.notify_all()
            with self._progress:
                self._progress.wait(0.05)
        return self._spool.pending == 0

    def finish(self, status: str = "FINISHED", timeout: float = 60.0) -> bool:
        """Ends the run and delivers what is left; True when the server has everything.

        What it could not take stays on disk, and a warning says how much and how to upload it.
        """
        if self._finished:
            return True
        self._finished = True
        if self._owner:
            self.log_cost({names.SECONDS: time.monotonic() - self._started})
            lost = self._spool.metrics.lost + self._spool.artifacts.lost
            if lost:
                self.set_tags({"lost": f"{lost} records found no room in the buffer"})
            self._spool.metrics.append({"kind": "end", "status": status, "time": int(time.time() * 1000)})
        self.flush(timeout)
        self._closing.set()
        with self._wake:
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=RETRY_AT_MOST)
        left = self._spool.pending
        lost, rejected = self._spool.metrics.lost + self._spool.artifacts.lost, self._spool.rejected
        delivered = self._spool.close()
        if lost:
            print(
                f"tracking: {lost} records of run {self.id} were lost: the buffer in {spool_root()} was full",
                file=sys.stderr,
            )
        if not delivered:
            print(
                f"tracking: {left} records of run {self.id} not delivered to {redacted(self.uri)}"
                f"{f', {rejected} refused by it' if rejected else ''} ({self.error or 'refused'}); kept in "
                f"{self._spool.folder}. Upload with: python -m pipeline.tracking upload",
                file=sys.stderr,
                flush=True,
            )
        return delivered and not lost

    def _pump(self, queue: Queue, send: Callable[[], bool]) -> None:
        """Delivers one queue until the run is closed. Any failure waits (longer each time) and tries again."""
        delay = 0.0
        while True:
            closing = self._closing.is_set()
            try:
                while send():
                    pass
                delay = 0.0
            except Exception as error:  # whatever happens to the server, training goes on
                if not delay:
                    log.warning("%s: %s; keeping records in %s", redacted(self.uri), _brief(error), self._spool.folder)
                delay = min(RETRY_AT_MOST, delay * 2 or SEND_EVERY)
                self.error = _brief(error)
                self._attempts += 1
            with self._progress:
                self._progress.notify_all()
            if closing:
                return
            with self._wake:
                # While the server is away nobody's flush may hurry us: wait on the event, not on the condition.
                if not delay and not self._closing.is_set():
                    self._wake.wait(SEND_EVERY)
            if delay:
                self._closing.wait(delay)

    def _start(self) -> None:
        for queue, send in (
            (self._spool.metrics, self._delivery.send_metrics),
            (self._spool.artifacts, self._delivery.send_artifacts),
        ):
            thread = threading.Thread(target=self._pump, args=(queue, send), name="tracking", daemon=True)
            thread.start()
            self._threads.append(thread)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {redacted(str(error).splitlines()[0][:200]) if str(error) else ''}"


def start_run(
    experiment: str,
    name: str,
    *,
    config: Any = None,
    tags: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    parent_id: str | None = None,
    tracking_uri: str | None = None,
) -> Run:
    """Starts a run, or continues `run_id` (its points are not repeated: a step it already has is dropped).

    config: a dataclass or mapping; becomes flat parameters and the artifact config.yaml.
    The commit, an uncommitted diff and the environment are recorded too, except for children (`parent_id`).
    Raises UserError when the server refuses us (credentials, host name): that needs a person. A server that cannot be
    reached raises nothing: the run starts under an offline id and is delivered later.
    """
    uri = globals()["tracking_uri"](tracking_uri)
    plain = to_dict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else dict(config or {})
    code = {} if parent_id else _code_version()
    all_tags = {
        names.USER: _user(),
        names.SOURCE_NAME: os.path.basename(sys.argv[0] or "python"),
        names.SOURCE_TYPE: "LOCAL",
        **code,
        **{key: str(value)[:VALUE] for key, value in (tags or {}).items()},
    }
    if job := os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("RAY_JOB_ID"):
        all_tags.setdefault(names.RAY_JOB, job)
    spool = Spool(
        {
            "uri": uri,
            "experiment": experiment,
            "name": name,
            "tags": all_tags,
            "run_id": run_id,
            "parent_id": parent_id,
            "start_time": int(time.time() * 1000),
        }
    )
    run = Run(spool, fill_gaps=run_id is not None, owner=True)
    params = {key: str(value)[:VALUE] for key, value in flatten(plain).items()}
    if run_id:
        spool.metrics.append({"kind": "resume", "params": params})
        run.set_tags({**code, **(tags or {})})
    else:
        run.log_params(params)
    if plain:
        run.log_dict(plain, "config.yaml")
    if not parent_id:
        if diff := _code_diff():
            run.log_text(diff, "code/diff.patch")
        run.log_dict(_environment(), "environment.json")
    try:
        run._delivery.resolve()
    except UserError:
        shutil.rmtree(spool.folder, ignore_errors=True)
        raise
    except Exception as error:
        if _refused(error):
            shutil.rmtree(spool.folder, ignore_errors=True)
            raise UserError(
                f"MLflow at {redacted(uri)} refuses us: {_brief(error)}; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), and start the server with --allowed-hosts naming "
                "the host in this address"
            ) from error
        run.error = _brief(error)
        print(
            f"tracking: {redacted(uri)} cannot be reached ({run.error}); recording on disk and delivering later",
            file=sys.stderr,
            flush=True,
        )
    else:
        if not parent_id:
            print(f"tracking: {experiment}/{name} run {run.id} at {run.url}", file=sys.stderr, flush=True)
    run._start()
    return run


def attach_run(run_id: str, tracking_uri: str, *, resume: bool = False) -> Run:
    """Another writer into a run that someone else owns (system metrics of another node): `finish` only delivers.

    resume: steps that the run already has are dropped, as `start_run(run_id=...)` does.
    """
    header = {
        "uri": globals()["tracking_uri"](tracking_uri),
        "experiment": "",
        "name": "",
        "tags": {},
        "run_id": run_id,
        "parent_id": None,
        "start_time": 0,
    }
    run = Run(Spool(header), fill_gaps=resume, owner=False)
    run._start()
    return run


def _refused(error: Exception) -> bool:
    code = getattr(error, "error_code", "")
    return code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED") or "error code 403" in str(error)


# ---------------------------------------------------------------- code and environment


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        return str(os.getuid())


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", PROJECT, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


@functools.cache
def _code_diff() -> str:
    return _git("diff", "HEAD")[: 1 << 20]


@functools.cache
def _code_version() -> dict[str, str]:
    """Commit tags, from git or (in a shipped copy without .git) from GIT_COMMIT."""
    commit = _git("rev-parse", "HEAD").strip() or os.environ.get("GIT_COMMIT", "")
    if not commit:
        return {}
    return {names.COMMIT: commit, names.SOURCE_COMMIT: commit, names.DIRTY: str(bool(_code_diff())).lower()}


@functools.cache
def _environment() -> dict[str, Any]:
    """Host, devices and every installed package, as the artifact environment.json."""
    gpus = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpus": gpus.strip().splitlines(),
        "packages": dict(sorted(packages.items(), key=lambda item: (item[0] or "").lower())),
    }
