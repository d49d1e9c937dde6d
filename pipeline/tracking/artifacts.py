"""Downloads artifacts from MLflow."""

import tempfile

from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.tracking.server import global_server, mlflow_address, resolve_tracking_uri

SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")


def fetch(uri: str, tracking_uri: str | None = None) -> str:
    """A local folder with the artifacts of `models:/name/version`, `models:/name@alias` or `runs:/id/path`.

    Any other URI is returned unchanged. The folder is removed when the process ends. Raises UserError if the model, run
    or path does not exist.
    """
    if not uri.startswith(SCHEMES):
        return uri
    import mlflow

    where = resolve_tracking_uri(tracking_uri)
    folder = tempfile.TemporaryDirectory(prefix="mlflow-artifacts-")
    _KEPT.append(folder)
    try:
        with global_server(where):  # MLflow looks up registered models on its global server only
            return mlflow.artifacts.download_artifacts(uri, dst_path=folder.name, tracking_uri=mlflow_address(where))
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise UserError(f"{uri}: {redacted(str(error).splitlines()[0])}; MLflow is at {redacted(where)}") from error


_KEPT: list[tempfile.TemporaryDirectory] = []
"""Temporary folders, removed when the process ends."""
