"""Files that MLflow keeps, on this machine."""

import tempfile

from pipeline.errors import UserError

SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")


def fetch(uri: str, tracking_uri: str | None = None) -> str:
    """A local folder with the artifacts of `models:/name/version`, `models:/name@alias` or `runs:/id/path`.

    Any other URI comes back as it is. The folder lives until the process ends. Raises UserError when there is no such
    model, run or path.
    """
    if not uri.startswith(SCHEMES):
        return uri
    import mlflow

    from pipeline.tracking.run import tracking_uri as resolve

    folder = tempfile.TemporaryDirectory(prefix="mlflow-artifacts-")
    _KEPT.append(folder)
    try:
        return mlflow.artifacts.download_artifacts(uri, dst_path=folder.name, tracking_uri=resolve(tracking_uri))
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise UserError(f"{uri}: {str(error).splitlines()[0]}; MLflow is at {resolve(tracking_uri)}") from error


_KEPT: list[tempfile.TemporaryDirectory] = []
"""Temporary folders, removed with the process."""
