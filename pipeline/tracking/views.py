"""Prepared views of the experiments in MLflow's UI.

A view is MLflow's "shared view", a tag of the experiment that the UI of `make ui` opens automatically; on an MLflow
server, the link in the experiment's description opens it. It has columns
for progress, quality and cost of the runs, and charts over images seen, because steps are not comparable between batch
sizes. MLflow (3.17) has no setting for the width of a column or the digits of a number: the UI of `make ui` breaks the titles
of columns into lines, and on an MLflow server a tooltip shows them in full.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

from pipeline.tracking import names

SHARE = "mlflow.sharedViewState."
VIEW = "overview"

TITLES = {
    names.PREPARE: "Datasets made from raw images, with their size, rejected images and duplicates.",
    names.PRETRAIN: "Pre-training runs, the best validation accuracy first.",
    names.TRANSFER: "Transfer of checkpoints to the tasks of a suite: a parent run with a child per task.",
    names.EVALUATE: "Transfer scores of every checkpoint of a run.",
    names.PIPELINE: "Runs of whole pipelines (jobs/pipeline.py): stages, costs and the graph are in the description and artifacts.",
    names.COMPARE: "Leaderboards of pre-training runs (jobs/compare.py), in the descriptions and artifacts.",
    names.VISUALIZE: "Visualizations of checkpoints (jobs/visualize.py), in the artifacts.",
}
COLUMNS = {
    names.PREPARE: [
        "params.`encoding`",
        "params.`size`",
        *(f"metrics.`{name}`" for name in (names.ROWS, names.INPUTS, names.REJECTS, names.DUPLICATES, names.BYTES)),
        f"metrics.`{names.PREPARED_PER_SECOND}`",
        f"metrics.`{names.SECONDS}`",
        f"tags.`{names.REASON}`",
    ],
    names.PRETRAIN: [
        f"metrics.`{names.VAL_TOP1}`",
        f"metrics.`{names.LOSS}`",
        f"metrics.`{names.IMAGES_SEEN}`",
        f"metrics.`{names.IMAGES_PER_SECOND}`",
        f"metrics.`{names.GOODPUT}`",
        f"tags.`{names.RECIPE}`",
        "params.`model.variant`",
        "attributes.`Dataset`",
        f"metrics.`{names.SECONDS}`",
        f"tags.`{names.REASON}`",
    ],
    names.TRANSFER: [
        f"metrics.`{names.MEAN_SCORE}`",
        f"metrics.`{names.MEAN_ERROR}`",
        *(f"metrics.`{names.GROUP_SCORE}{group}`" for group in ("natural", "specialized", "structured")),
        "params.`suite`",
        f"tags.`{names.VARIANT}`",
        f"tags.`{names.IMAGES_SEEN}`",
        f"tags.`{names.REASON}`",
    ],
    names.EVALUATE: [
        f"metrics.`{names.MEAN_SCORE}`",
        f"metrics.`{names.MEAN_ERROR}`",
        f"metrics.`{names.IMAGES_SEEN}`",
        "params.`suite`",
        f"tags.`{names.CHECKPOINT}`",
    ],
    names.PIPELINE: [
        *(f"metrics.`{names.COST}{key}`" for key in ("cpu_hours", "gpu_hours", "dollars")),
        "tags.`output`",
        f"tags.`{names.REASON}`",
    ],
    names.COMPARE: [],
    names.VISUALIZE: [f"tags.`{names.CHECKPOINT}`"],
}
"""The columns between the time of creation and the duration. MLflow leaves out those that no run has."""
LEADERBOARD_OF_SERVER = "`python jobs/compare.py` writes the leaderboard, in the experiment compare"
QUALITY = {
    names.PRETRAIN: f"metrics.`{names.VAL_TOP1}`",
    names.TRANSFER: f"metrics.`{names.MEAN_SCORE}`",
    names.EVALUATE: f"metrics.`{names.MEAN_SCORE}`",
}
"""The metric by which the runs of an experiment are sorted, best first; other experiments are sorted by time."""
CHARTS = {
    names.PRETRAIN: [
        names.LOSS,
        names.VAL_TOP1,
        names.IMAGES_PER_SECOND,
        names.GOODPUT,
        names.LEARNING_RATE,
        names.GRAD_NORM,
    ],
    names.EVALUATE: [names.MEAN_SCORE],
}


def experiment_tags(name: str, identifier: str, on_server: bool = False) -> dict[str, str]:
    """Tags of an experiment: its kind, its description with links to the view, and the view.

    on_server: on an MLflow server, which has no /leaderboard and does not open the view by itself."""
    tags = {"mlflow.experimentKind": "custom_model_development", names.NOTE: TITLES.get(name, "")}
    if name in COLUMNS:
        view = f"#/experiments/{identifier}/runs?viewStateShareKey={VIEW}"
        links = [f"[Table]({view})"]
        if name in CHARTS:
            links.append(f"[Curves by images seen]({view}&compareRunsMode=CHART)")
        if name == names.TRANSFER:
            links.append(LEADERBOARD_OF_SERVER if on_server else "[Leaderboard](/leaderboard), with `make ui`")
        tags[names.NOTE] += " " + " · ".join(links)
        tags[SHARE + VIEW] = json.dumps(_view(name))
    return tags


def _view(name: str) -> dict[str, Any]:
    view: dict[str, Any] = {
        "orderByKey": QUALITY.get(name, "attributes.start_time"),
        "orderByAsc": False,
        "startTime": "ALL",
        # Only parent runs have a suite; child runs would be sorted among them.
        "searchFilter": "params.suite LIKE '%'" if name == names.TRANSFER else "",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": ["attributes.`Created`", *COLUMNS[name], "attributes.`Duration`"],
        "columnOrder": ["attributes.`Created`", *COLUMNS[name], "attributes.`Duration`"],
        "globalLineChartConfig": {
            "xAxisKey": "metric",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": names.IMAGES_SEEN,
        },
        "hideEmptyCharts": True,
        "runsExpanded": {},
        "runsHidden": [],
        "runsPinned": [],
        "groupBy": None,
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "autoRefreshEnabled": True,
    }
    if name in CHARTS:
        view["compareRunSections"] = [{"uuid": VIEW, "name": "Learning", "display": True, "isReordered": False}]
        view["compareRunCharts"] = [_line_chart(metric) for metric in CHARTS[name]]
    return view


STYLE = """body {font: 14px/1.5 sans-serif; margin: 24px; color: #1c2024} table {border-collapse: collapse; margin: 12px 0}
td, th {border-bottom: 1px solid #ddd; padding: 4px 10px; text-align: left} th {background: #f5f6f7} img {max-width: 100%}
td {font-variant-numeric: tabular-nums} code {font-size: 12px; overflow-wrap: anywhere}"""


def page(markdown: str, pictures: Mapping[str, bytes] | None = None) -> str:
    """Markdown and PNGs {caption: bytes} as one HTML page, because MLflow's
    artifact viewer does not render Markdown."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for caption, png in (pictures or {}).items():
        body += f'<img alt="{caption}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'
    return f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style>\n{body}'


def _line_chart(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": metric,
        "metricSectionId": VIEW,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "selectedYAxisMetricKey": "metric",
        "yAxisExpressions": [],
        "yAxisKey": "metric",
        "scaleType": "linear",
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": names.IMAGES_SEEN,
        "xAxisScaleType": "linear",
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
        "lineSmoothness": 0,
        "range": {},
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": False,
    }
