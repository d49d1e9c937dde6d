"""Transfer: evaluates a checkpoint on the tasks of a suite and reports their scores.

run_suite(config) -> SuiteResult   a whole suite                              run.py
open_backbone(name) -> module      a model: a checkpoint, timm, transformers  backbones.py, checkpoint.py
TransferConfig, SUITES             suites; tasks and their protocols          suites.py, protocols.py
next_jobs                          the unfinished jobs                        jobs.py
Scheduler, Worker                  jobs on Ray actors                         scheduler.py, worker.py
FineTuning, predict                one task in one process                    finetune.py, predictions.py
extract_features                   features of frozen models                  features.py
check_heads, run_head              the checkpoint's own classifier            head.py
Store, SuiteState                  the output folder                          store.py
Recorder                           MLflow                                     record.py
collect_scores, suite_report       scores and their table                     scores.py, corrections.py, references.py
                                                                              report.py, figures.py, progress.py
"""

from typing import TYPE_CHECKING

from pipeline import lazy
from pipeline.transfer.suites import SUITES, TransferConfig

if TYPE_CHECKING:
    from pipeline.transfer.backbones import open_backbone
    from pipeline.transfer.run import SuiteResult, run_suite

__all__ = ["SUITES", "SuiteResult", "TransferConfig", "open_backbone", "run_suite"]

# Imported on first use: torch and Ray take seconds to import, and --help does not need them.
__getattr__ = lazy.exports(__name__, {"run": ("SuiteResult", "run_suite"), "backbones": ("open_backbone",)})
