"""The rule by which a checkpoint becomes the champion of a pipeline's registered model."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PromoteConfig:
    """Which scores decide, and what a score has to reach."""

    model: str
    """Registered MLflow model: the pipeline's name."""
    scores: tuple[str, ...]
    """Output folders of jobs/transfer.py; those of one checkpoint are averaged."""
    output: str
    """Folder for promotion.json."""
    metric: str = "mean"
    """mean, or the name of a task in percent."""
    at_least: float | None = None
    """A smaller score is not promoted."""
    no_worse_than: Literal["champion"] | None = None
    """champion: a score below the present champion's, measured in the same way, is not promoted."""
    margin: float = 0.0
    """How many standard errors of the difference a score may be below the champion's."""
    tracking_uri: str | None = None
    """MLflow server; default MLFLOW_TRACKING_URI, or SQLite in this folder."""
