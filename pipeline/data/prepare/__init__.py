"""Prepares datasets of shards from image sources with Ray Data.

The sources are divided into slices deterministically. A task reads, checks and transforms the images of a slice, writes
the shards and returns only a summary, so image bytes do not pass through Ray's object store and the memory of the
driver does not grow with the corpus. A receipt on storage marks a slice as done. A killed job that is run again
processes the remaining slices and produces a byte-identical dataset, independent of the number of workers.

    <output>/manifest.json          written last       (with --splits: <output>/<split>/manifest.json)
    <output>/part-UUUUU-NNNN.parquet                   slice and shard in it
    <output>/rejects.parquet
    <output>/_work/                 plan and receipts of an unfinished dataset; removed at the end

    config        PrepareConfig, recipes; checks: its rules   deduplicate   rows that repeat another row
    plan          sources -> slices, claim of the output      shuffle       global shuffle of archives
    worker        one slice -> shards and a receipt           finish        receipts -> manifests and reports
    run           the phases in order                         record        the MLflow run
    download      --download-only                             retry         further passes over failed downloads
"""

from typing import TYPE_CHECKING

from pipeline import lazy
from pipeline.data.prepare.config import RECIPES, PrepareConfig

if TYPE_CHECKING:
    from pipeline.data.prepare.download import download_images
    from pipeline.data.prepare.run import prepare

__all__ = ["RECIPES", "PrepareConfig", "download_images", "prepare"]

__getattr__ = lazy.exports(__name__, {"run": ("prepare",), "download": ("download_images",)})
