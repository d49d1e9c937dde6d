"""Runs in MLflow: the only package that imports it, and the one place that names metrics and tags (`names`)."""

from pipeline.tracking.run import Run, attach_run, start_run, tracking_uri

__all__ = ["Run", "attach_run", "start_run", "tracking_uri"]
