"""Runs in MLflow: the only package that imports it, and the one place that names metrics and tags.

names        every experiment, metric and tag name
run          start_run, attach_run, Run: what jobs log through, never waiting for the server
spool        the buffer on disk behind them; `python -m pipeline.tracking upload` delivers what was left
delivery     sending a spool's records to the server
server       the server's address, its client, and what its refusals mean
environment  commit, devices and packages of a run
system       SystemMetrics: CPU, memory, network and GPUs of one node, logged into the run
registry     registered models and their scores
search       reading runs back
leaderboard  transfer results beside the pre-training runs behind them
views        what a person sees first in MLflow's UI
artifacts    files that MLflow keeps, on this machine
classifier   the code that a registered model brings along
"""

from pipeline.tracking.run import Run, attach_run, start_run
from pipeline.tracking.server import resolve_tracking_uri

__all__ = ["Run", "attach_run", "resolve_tracking_uri", "start_run"]
