"""An additional permission check of the MLflow server: only an admin may set the location of artifacts.

`serve.py` sets `authenticate` in MLflow's auth configuration. MLflow calls it for every request that needs an account.
A custom artifact location would let its creator read and write any folder of the server."""

from typing import Any

from flask import Response, request

LOCATION = "artifact_location"


def authenticate() -> Any:
    """Checks the user and password with MLflow. Returns 403 if a user who is not an admin sets a location."""
    from mlflow.server import auth

    found = auth.authenticate_request_basic_auth()
    if isinstance(found, Response) or not request.path.endswith("/experiments/create"):
        return found
    body = request.get_json(force=True, silent=True)
    chosen = not isinstance(body, dict) or body.get(LOCATION) or body.get("artifactLocation")
    if chosen and not auth.store.get_user(found.username).is_admin:
        return Response("Only an admin may set the artifact location of an experiment.", 403)
    return found
