"""Reads runs from MLflow as plain values."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.tracking import mlflow_private
from pipeline.tracking.server import client, resolve_tracking_uri, run_url


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A finished or running MLflow run."""

    id: str
    name: str
    experiment: str
    status: str
    start_time: int
    url: str
    path: str
    """The path of the run relative to the address of the server, for links inside MLflow."""
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def search_runs(experiment: str, *, filter: str = "", uri: str | None = None) -> Iterator[RunInfo]:
    """The active runs of an experiment, newest first; `filter` is MLflow's search syntax."""
    uri = resolve_tracking_uri(uri)
    mlflow = client(uri)
    found = mlflow.get_experiment_by_name(experiment)
    token = None
    while found is not None:
        page = mlflow.search_runs([found.experiment_id], filter, max_results=1000, page_token=token)
        for run in page:
            yield RunInfo(
                id=run.info.run_id,
                name=run.info.run_name or run.info.run_id[:8],
                experiment=experiment,
                status=run.info.status,
                start_time=run.info.start_time,
                url=run_url(uri, found.experiment_id, run.info.run_id),
                path=f"#/experiments/{found.experiment_id}/runs/{run.info.run_id}",
                params=dict(run.data.params),
                metrics=dict(run.data.metrics),
                tags=dict(run.data.tags),
            )
        token = page.token
        if not token:
            return


def read_runs(experiment: str, *, with_param: str = "", uri: str | None = None) -> Iterator[RunInfo]:
    """Like `search_runs`, but fast for thousands of runs in a database. with_param: only runs with this parameter."""
    uri = resolve_tracking_uri(uri)
    if uri.startswith("http"):
        yield from search_runs(experiment, filter=f"params.`{with_param}` LIKE '%'" if with_param else "", uri=uri)
        return
    found = client(uri).get_experiment_by_name(experiment)
    if found is None:
        return
    for values in mlflow_private.read_runs(uri, found.experiment_id, with_param):
        run, name = values["id"], values.pop("name")
        yield RunInfo(
            **values,
            name=name or run[:8],
            experiment=experiment,
            url=run_url(uri, found.experiment_id, run),
            path=f"#/experiments/{found.experiment_id}/runs/{run}",
        )
