"""The MLflow run of a pipeline, with links to its stages, costs, a plot of the graph and a report page.

The run is created in the background. Runs of stages carry an id of the pipeline run as a tag, so that no stage waits for
MLflow; the links are made at the end.
"""

import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline import config as configuration
from pipeline import tracking
from pipeline.graph import cost, report
from pipeline.graph.file import PROMOTE
from pipeline.graph.plan import FAILED, Plan, Status
from pipeline.tracking import names, search, server
from pipeline.tracking.description import CONTINUE, command_paragraph
from pipeline.tracking.views import page

logger = logging.getLogger(__name__)

EXPERIMENTS = {
    "prepare": names.PREPARE,
    "vtab": names.PREPARE,
    "pretrain": names.PRETRAIN,
    "transfer": names.TRANSFER,
    "evaluate": names.EVALUATE,
    "visualize": names.VISUALIZE,
    "compare": names.COMPARE,
}


class PipelineRecord:
    """The MLflow run of one pipeline run. Failures of MLflow are warnings, because no stage depends on them."""

    def __init__(self, plan: Plan, continued: bool = False) -> None:
        """continued: an earlier runner did not finish this run of the pipeline; see `runner.about_run`."""
        self.plan, self.continued = plan, continued
        self.uri = tracking.resolve_tracking_uri(plan.pipeline.tracking_uri)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pipeline-record")
        known = plan.state.run.get("run_id")
        self._run: Future[tracking.Run] = self._pool.submit(self._start, known)

    def _start(self, known: str | None) -> tracking.Run:
        pipeline, run = self.plan.pipeline, self.plan.state.run
        if known is None and self.continued:
            known = self._unrecorded()
        made = tracking.start_run(
            names.PIPELINE,
            pipeline.name,
            config=configuration.to_dict(pipeline),
            tags={names.PIPELINE_NAME: pipeline.name, names.PIPELINE_RUN: run["id"], "output": self.plan.state.root},
            run_id=known,
            tracking_uri=self.uri,
        )
        run["run_id"] = made.id
        importlib.import_module("matplotlib.figure")  # takes a second, which would delay the end
        return made

    def _unrecorded(self) -> str | None:
        """The id of the MLflow run of an earlier runner that was killed before it wrote the id to state.json."""
        try:
            wanted = f"tags.`{names.PIPELINE_RUN}` = '{self.plan.state.run['id']}'"
            found = next(search.search_runs(names.PIPELINE, filter=wanted, uri=self.uri), None)
        except Exception as error:  # an unreachable server is reported by tracking.start_run
            logger.debug("search for an earlier run of the pipeline: %s", server.first_line(error))
            return None
        return found.id if found else None

    def finish(
        self, states: Mapping[str, Status], rows: Sequence[Sequence[str]], estimates: Mapping[str, float], status: str
    ) -> str:
        """Links the stages, logs costs, plot and page, and ends the run. Returns its URL, empty if MLflow failed."""
        try:
            run = self._run.result()
            found = self._stages(run, states)
            links = {name: info.path for name, info in found.items()} | _registered(states)
            run.log(_costs(states, estimates))
            run.set_tags({f"stage.{_readable(name)}": info.id for name, info in found.items()})
            picture = report.picture(self.plan, states)
            markdown = report.page(self.plan, states, rows, links)
            run.log_bytes(picture, "graph.png")
            run.log_text(markdown, "report.md")
            # Links do not work in the frame in which MLflow shows a page; the description of the run has the links.
            run.log_text(page(report.page(self.plan, states, rows, {}), {"graph": picture}), "report.html")
            again = f"{CONTINUE} the same command again runs what is not done."
            body = markdown.partition("\n")[2].lstrip("\n")  # MLflow folds a long description: no title, results first
            text = f"{report.sentence(self.plan, states)}\n\n{command_paragraph()}\n\n{again}\n\n{body}"
            whole = len(text) <= names.MAX_VALUE
            run.set_tags({names.NOTE: text if whole else text[: names.MAX_VALUE].rpartition("\n")[0]})
            run.finish(status, reason=_reason(states, status))
            return run.url
        except Exception as error:
            logger.warning("the pipeline's run in MLflow is incomplete: %s", server.first_line(error))
            return ""
        finally:
            self._pool.shutdown(wait=False)

    def _stages(self, run: tracking.Run, states: Mapping[str, Status]) -> dict[str, search.RunInfo]:
        """Links the runs of the stages to that of the pipeline. Returns {stage: its newest run}."""
        pipeline = self.plan.pipeline.name
        kinds = {self.plan.instances[name].kind.name for name in states}
        found: dict[str, search.RunInfo] = {}
        for experiment in dict.fromkeys(EXPERIMENTS[kind] for kind in sorted(kinds) if kind in EXPERIMENTS):
            wanted = f"tags.`{names.PIPELINE_NAME}` = '{pipeline}'"
            for info in search.search_runs(experiment, filter=wanted, uri=self.uri):
                stage = info.tags.get(names.PIPELINE_STAGE, "")
                if stage in states and stage not in found and names.PARENT not in info.tags:
                    found[stage] = info
        client = server.client(self.uri)
        for name, info in found.items():
            version = states[name].version
            if version is not None:
                version.run_id = info.id
            if info.tags.get(names.PIPELINE_RUN) == self.plan.state.run.get("id"):
                client.set_tag(info.id, f"{names.LINEAGE}pipeline", run.id)
        return found


def _reason(states: Mapping[str, Status], status: str) -> str:
    """The reason why a pipeline did not finish."""
    if status == "KILLED":
        return "stopped, with its running stages"
    return "; ".join(f"{name}: {one.why}" for name, one in states.items() if one.state == FAILED)


def _costs(states: Mapping[str, Status], estimates: Mapping[str, float]) -> dict[str, float]:
    spent: dict[str, Any] = {name: status.version.cost for name, status in states.items() if status.version is not None}
    values = {
        f"stage/{_readable(name)}/{key}": float(v)
        for name, one in spent.items()
        for key, v in one.items()
        if isinstance(v, int | float)
    }
    values |= {f"stage/{_readable(name)}/estimated_seconds": value for name, value in estimates.items()}
    return values | {
        f"{names.COST}{key}": value for key, value in cost.total(list(spent.values())).items() if key != "seconds"
    }


def _registered(states: Mapping[str, Status]) -> dict[str, str]:
    """{promote: page of the registered champion}"""
    version = states[PROMOTE].version if PROMOTE in states else None
    if version is None or not version.result.get("champion"):
        return {}
    return {PROMOTE: f"#/models/{version.result['model']}/versions/{version.result['champion']}"}


def _readable(name: str) -> str:
    """The name of a stage in characters that MLflow accepts: "pretrain lr 1e-3 seed 1" for pretrain[lr=1e-3,seed=1]."""
    return re.sub(r"[\[\]=,]+", " ", name).strip()
