"""Runs in MLflow. No other package imports MLflow or defines names of metrics and tags.

names        names of experiments, metrics and tags
run          start_run, attach_run, Run: the interface for jobs, which do not wait for the server
spool        buffer on disk; `python -m pipeline.tracking upload` delivers remaining records
delivery     sends the records of a spool to the server
server       the server's address, its client and its errors
environment  commit, devices and packages of a run
system       SystemMetrics: CPU, memory, network and GPUs of one node
registry     registered models and their scores
search       reads runs
leaderboard  transfer results with their pre-training runs
views        prepared views of experiments in MLflow's UI
artifacts    downloads artifacts
classifier   the code in a registered model
"""

from pipeline.tracking.run import Run, attach_run, start_run
from pipeline.tracking.server import resolve_tracking_uri
from pipeline.tracking.spool import check_spool

__all__ = ["Run", "attach_run", "check_spool", "resolve_tracking_uri", "start_run"]
