"""Configuration of `jobs/prepare.py vtab`."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VtabConfig:
    """Build the VTAB-1k tasks from the archives that their authors publish."""

    tasks: tyro.conf.Positional[tuple[str, ...]]
    """Names of the tasks to build, or all."""
    raw: str
    """Folder or s3:// prefix of the published archives."""
    output: str
    """Folder or s3:// prefix for the datasets OUTPUT/<task>/<split>."""
    splits: tuple[str, ...] = ("train800", "val200", "train800val200", "test")
    """Splits to build. train, val and trainval are the full pools of images."""
    download: bool = False
    """Download missing archives that have a public URL."""
    no_verify: bool = False
    """Skip the comparison of checksums and counts with the official ones."""
    address: str | None = None
    """Ray cluster to join (auto or host:port). None: the cluster of the submitted job, or an embedded Ray."""
    num_cpus: int | None = None
    """CPU cores for an embedded Ray. None: all."""
    tracking: bool = True
    """Log the run to MLflow."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""
