"""Private interfaces of MLflow: its database tables, the settings of its server, and keys of its UI.

Written for MLflow 3.17.2 (`WRITTEN_FOR`); tests/unit/test_private_interfaces.py checks the installed version and
compares this module's results with those of the public interface. The tables are read directly because MLflow's search
creates an object for every parameter, tag and metric: it needs more than 5 seconds for 1,000 pre-training and 1,000
transfer runs.
"""

import os
from collections.abc import Iterator
from typing import Any

from pipeline.tracking.server import mlflow_address

WRITTEN_FOR = "3.17.2"

WORKFLOW = "mlflow.workflowType_v1"
"""Key in the browser's local storage: whether the UI shows training runs or language models."""
ASSISTANT = "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"
"""Key in the browser's local storage: whether the assistant has already opened automatically."""

COLUMN_TITLE = '[data-testid^="sort-header-"]'
"""Title of a column in the list of runs. Every column is 100 pixels wide; a view cannot say how wide."""


def server_settings(uri: str) -> dict[str, str]:
    """Environment variables of MLflow's server: the database to show, and that the server also serves artifacts."""
    return {
        "_MLFLOW_SERVER_FILE_STORE": mlflow_address(uri),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
    }


def read_runs(uri: str, experiment_id: str, with_param: str = "") -> Iterator[dict[str, Any]]:
    """The active runs of an experiment, newest first, as dictionaries: id, name, status, start_time, params, metrics
    (newest values), tags.

    with_param: only runs with this parameter.
    """
    import sqlalchemy as sql

    def table(name: str, *columns: str) -> Any:
        return sql.table(name, *map(sql.column, columns))

    runs = table("runs", "run_uuid", "name", "status", "start_time", "lifecycle_stage", "experiment_id")
    params = table("params", "run_uuid", "key", "value")
    wanted = sql.and_(runs.c.experiment_id == int(experiment_id), runs.c.lifecycle_stage == "active")
    if with_param:
        wanted &= runs.c.run_uuid.in_(sql.select(params.c.run_uuid).where(params.c.key == with_param))
    ids = sql.select(runs.c.run_uuid).where(wanted)

    def values(of: Any) -> Any:
        return sql.select(of).where(of.c.run_uuid.in_(ids))

    engine = sql.create_engine(mlflow_address(uri), poolclass=sql.NullPool)
    with engine.connect() as connection:
        found = sql.select(runs.c.run_uuid, runs.c.name, runs.c.status, runs.c.start_time).where(wanted)
        ordered = found.order_by(runs.c.start_time.desc(), runs.c.run_uuid)
        read: dict[str, dict[str, Any]] = {
            run: {
                "id": run,
                "name": name,
                "status": status,
                "start_time": start,
                "params": {},
                "metrics": {},
                "tags": {},
            }
            for run, name, status, start in connection.execute(ordered)
        }
        for kind, of in (("params", params), ("tags", table("tags", "run_uuid", "key", "value"))):
            for run, key, value in connection.execute(values(of)):
                if run in read:
                    read[run][kind][key] = value
        points = table("latest_metrics", "run_uuid", "key", "value", "is_nan")
        for run, key, value, is_nan in connection.execute(values(points)):
            if run in read:
                read[run]["metrics"][key] = float("nan") if is_nan else value
    engine.dispose()
    yield from read.values()


def use_settings(uri: str) -> None:
    """Sets the settings of MLflow's server for this process. Call before importing MLflow's application."""
    os.environ |= server_settings(uri)
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
