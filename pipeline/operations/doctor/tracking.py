"""Checks that the MLflow server accepts a client with these credentials."""

import base64
import configparser
import contextlib
import json
import os
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request

from pipeline.operations.doctor.finding import CheckResult, error, ok


def tracking_server(uri: str, patience: float = 10.0) -> CheckResult:
    """Sends an API request, because /health returns 200 even if all clients are rejected."""
    name = "tracking server"
    if not uri.startswith(("http://", "https://")):
        return ok(name, f"{uri.partition('://')[0]}, no server")
    parts = urllib.parse.urlsplit(uri)
    shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    request = urllib.request.Request(f"{shown.rstrip('/')}/api/2.0/mlflow/experiments/get?experiment_id=0")
    if authorization := _authorization(parts):
        request.add_header("Authorization", authorization)
    context = None
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None)
    if context and os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(request, timeout=patience, context=context) as answer:
            json.load(answer)["experiment"]
    except urllib.error.HTTPError as cause:
        remedies = {
            401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            403: f"add {parts.netloc.rpartition('@')[2]} to the server's --allowed-hosts, or give the account permission",
        }
        return error(name, f"{shown} answers {cause.code}", remedies.get(cause.code, "look at the server's log"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
        reason = getattr(cause, "reason", cause)
        if isinstance(reason, socket.gaierror):
            return error(
                name,
                f"the name {parts.hostname} cannot be resolved here",
                "correct MLFLOW_TRACKING_URI, or use a name or address that is known on every node",
            )
        if isinstance(reason, TimeoutError):
            return error(name, f"{shown} did not answer in {patience:g} s", "start it, or correct MLFLOW_TRACKING_URI")
        return error(
            name,
            f"{shown} does not respond like an MLflow server ({reason})",
            "start it, or correct MLFLOW_TRACKING_URI",
        )
    return ok(name, f"{shown} serves")


def _authorization(parts: urllib.parse.SplitResult) -> str:
    """The Authorization header of MLflow's client."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return f"Bearer {token}"
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not (user and password):
        saved = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error, OSError):
            saved.read(os.path.expanduser("~/.mlflow/credentials"))
        user = user or saved.get("mlflow", "mlflow_tracking_username", fallback=parts.username)
        password = password or saved.get("mlflow", "mlflow_tracking_password", fallback=parts.password)
    if not (user and password):
        return ""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
