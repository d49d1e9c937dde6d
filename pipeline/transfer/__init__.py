"""One checkpoint in, a table of transfer scores out.

run_suite(config) -> SuiteResult     the whole way                                   run.py
TransferConfig, SUITES               tasks and protocols                             suites.py
fine_tune, predict                   one task in one process                         finetune.py
extract                              the features, by Ray Data                       features.py
fan_out                              jobs over workers, resumable                    fanout.py
collect, means, compare              scores, report, figures, comparison             report.py
"""

from typing import TYPE_CHECKING, Any

from pipeline.transfer.suites import SUITES, TransferConfig

if TYPE_CHECKING:
    from pipeline.transfer.run import SuiteResult, run_suite

__all__ = ["SUITES", "SuiteResult", "TransferConfig", "run_suite"]


def __getattr__(name: str) -> Any:
    # On first use: torch and Ray take seconds to import, which --help has no need of.
    if name in ("SuiteResult", "run_suite"):
        from pipeline.transfer import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
