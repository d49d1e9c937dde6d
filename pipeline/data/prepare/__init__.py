"""From sources of images to a dataset of shards, on Ray Data.

The sources are cut into deterministic slices. The task that gets a slice reads, checks and transforms its images and writes
shards itself; only a summary of its receipt comes back, so image bytes never pass through Ray's object store and the driver's
memory does not grow with the corpus. A receipt on storage marks a slice as done: a job that is killed and run again repeats the
other slices and ends in the byte-identical dataset, whatever the number of workers.

    <output>/manifest.json          written last       (with --splits: <output>/<split>/manifest.json)
    <output>/part-UUUUU-NNNN.parquet                   slice and shard in it
    <output>/rejects.parquet
    <output>/_work/                 plan and receipts of an unfinished dataset, removed at the end

    config        PrepareConfig, recipes; checks: its rules   deduplicate   rows that repeat another row
    plan          sources -> slices, the claim of the output  mix           a global shuffle of archives
    worker        one slice -> shards and a receipt           finish        receipts -> manifests and reports
    run           the phases in order                         record        the MLflow run
"""

from typing import TYPE_CHECKING

from pipeline import lazy
from pipeline.data.prepare.config import RECIPES, PrepareConfig

if TYPE_CHECKING:
    from pipeline.data.prepare.run import prepare

__all__ = ["RECIPES", "PrepareConfig", "prepare"]

__getattr__ = lazy.exports(__name__, {"run": ("prepare",)})
