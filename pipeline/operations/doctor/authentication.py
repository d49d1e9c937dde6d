"""Ray's token authentication: mode, token, and permissions of the token file."""

import os
import stat

from pipeline import cluster
from pipeline.operations.doctor.finding import CheckResult, error, ok, warning


def authentication(address: str | None) -> CheckResult:
    """Checks token authentication as Ray 2.60 applies it to a job that connects to `address` (None: embedded Ray)."""
    name, mode = "authentication", os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled"):
        return error(name, f"RAY_AUTH_MODE={mode} is not a mode of Ray", "export RAY_AUTH_MODE=token")
    if mode == "disabled":
        return warning(
            name,
            "token authentication is off: anyone who can reach Ray's ports can run code as this user",
            "export RAY_AUTH_MODE=token on every node and where you submit",
        )
    if cluster.is_ray_job():
        return ok(name, "that of the cluster that runs this job")
    if not address:
        return ok(name, "on: the embedded Ray creates a token")
    if mode == "" and address != "auto":
        return warning(
            name,
            f"RAY_AUTH_MODE is not set: Ray sends no token to {address}, which rejects this job if it requires one",
            "export RAY_AUTH_MODE=token (or disabled, if the cluster has none)",
        )
    if mode == "token" and not has_token():
        return error(
            name,
            "RAY_AUTH_MODE=token, but no token was found",
            f"copy the head's token to {token_path()} (chmod 600), or set RAY_AUTH_TOKEN",
        )
    return ok(name, "on, with a token" if has_token() else "as the Ray of this machine")


def token_path() -> str:
    return os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")


def has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return os.path.isfile(token_path()) and os.path.getsize(token_path()) > 0


def token_file() -> CheckResult:
    """Checks the mode of the token file, which Ray creates with the current umask."""
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN") or not os.path.isfile(path):
        return ok("token file", "none needed")
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        return warning("token file", f"{path} can be read by other users of this machine", f"chmod 600 {path}")
    return ok("token file", f"{path}, readable only by its owner")
