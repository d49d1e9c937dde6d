"""What `jobs/prepare.py vtab` builds, and where."""

import dataclasses

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VtabConfig:
    """Builds VTAB-1k's tasks from the archives as their authors publish them."""

    tasks: tyro.conf.Positional[tuple[str, ...]]
    """Names of the tasks to build, or all."""
    raw: str
    """Folder or s3:// prefix of the published archives."""
    output: str
    """Folder or s3:// prefix for the datasets OUTPUT/<task>/<split>."""
    splits: tuple[str, ...] = ("train800", "val200", "train800val200", "test")
    """Splits to build. train, val and trainval are the full pools of images."""
    download: bool = False
    """Fetch archives that --raw lacks and that have a public address."""
    no_verify: bool = False
    """Accept archives without comparing checksums and official counts."""
    address: str | None = None
    """Ray cluster to join (auto or host:port). None: the cluster of the submitted job, or an embedded Ray."""
    num_cpus: int | None = None
    """CPU cores for an embedded Ray. None: all."""
    tracking: bool = True
    """Record the preparation in MLflow."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""
