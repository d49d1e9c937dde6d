"""Runs in MLflow: the only package that imports it, and the one place that names metrics and tags.

names       every experiment, metric and tag name
run         start_run, attach_run, Run: what jobs log through, never waiting for the server
spool       the buffer on disk behind them; `python -m pipeline.tracking upload` delivers what was left
system      SystemMetrics: one node's CPU, memory, network, GPUs in the run
registry    registered models and their scores; reading runs back
classifier  the code that a registered model brings along
"""

from pipeline.tracking.run import Run, attach_run, start_run, tracking_uri

__all__ = ["Run", "attach_run", "start_run", "tracking_uri"]
