"""Who may do what on the MLflow server beyond its own permissions: only an admin says where artifacts are stored.

`serve.py` names `authenticate` in MLflow's configuration of accounts. MLflow calls it for every request that needs an
account. An experiment with a location of its own would let its creator read and write any folder of the server.
"""

from typing import Any

from flask import Response, request

LOCATION = "artifact_location"


def authenticate() -> Any:
    """The request's user and password, checked by MLflow; 403 when another user than an admin chooses a location."""
    from mlflow.server import auth

    found = auth.authenticate_request_basic_auth()
    if isinstance(found, Response) or not request.path.endswith("/experiments/create"):
        return found
    body = request.get_json(force=True, silent=True)
    chosen = not isinstance(body, dict) or body.get(LOCATION) or body.get("artifactLocation")
    if chosen and not auth.store.get_user(found.username).is_admin:
        return Response("Only an admin may choose the artifact location of an experiment.", 403)
    return found
