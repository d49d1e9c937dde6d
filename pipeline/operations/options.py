"""Options of jobs that one command line gives in full: export, visualize, compare."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What is exported, as what, and where to."""

    checkpoint: str
    """Checkpoint or run folder, local or s3://, or an MLflow URI (models:/NAME/VERSION, runs:/ID/PATH)."""
    to: Literal["timm", "huggingface", "onnx", "torch-export", "safetensors"]
    """Format of the exported model."""
    output: str
    """New folder or s3:// prefix for the exported model."""
    images: str | None = None
    """Folder of images or dataset for comparing logits. None: sample photographs of scikit-learn."""
    tolerance: float = 1e-4
    """Maximum difference of logits, relative to the largest logit (at least 1)."""
    tracking_uri: str | None = None
    """MLflow server for models:/ and runs:/. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VisualizeConfig:
    """Settings of the visualization."""

    checkpoint: str
    """Checkpoint or run folder, local or s3://, or an MLflow URI (models:/NAME/VERSION, runs:/ID/PATH)."""
    output: str
    """Folder or s3:// prefix for the figures."""
    images: str | None = None
    """Folder of images or dataset. None: the validation set of the run."""
    limit: int = 128
    """Maximum number of images."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""
    log: bool = True
    """Log the figures to MLflow."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Settings of the comparison."""

    suite: str | None = None
    """Transfer suite. None: all suites."""
    output: str | None = None
    """Folder or s3:// prefix for leaderboard.md, leaderboard.json and compute.png."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""
    log: bool = True
    """Log the comparison to the MLflow experiment "compare"."""
