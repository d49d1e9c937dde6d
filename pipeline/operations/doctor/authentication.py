"""Ray's token authentication: mode, token, and who can read it."""

import os
import stat

from pipeline import cluster
from pipeline.operations.doctor.finding import CheckResult, error, ok, warning


def authentication(address: str | None) -> CheckResult:
    """Ray's token authentication, as Ray 2.60 will decide about it for a job that joins `address` (None: its own Ray)."""
    name, mode = "authentication", os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled"):
        return error(name, f"RAY_AUTH_MODE={mode} is no mode of Ray", "export RAY_AUTH_MODE=token")
    if mode == "disabled":
        return warning(
            name,
            "token authentication is off: whoever reaches Ray's ports runs code as you",
            "export RAY_AUTH_MODE=token on every node and where you submit",
        )
    if cluster.submitted():
        return ok(name, "that of the cluster which runs this job")
    if not address:
        return ok(name, "on: Ray gives its own cluster a token")
    if mode == "" and address != "auto":
        return warning(
            name,
            f"RAY_AUTH_MODE is not set: Ray sends no token to {address}, which refuses this job if it asks for one",
            "export RAY_AUTH_MODE=token (or disabled, if the cluster has none)",
        )
    if mode == "token" and not has_token():
        return error(
            name,
            "RAY_AUTH_MODE=token, but there is no token here",
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
    """Ray writes the token with the umask it finds: others may read it."""
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN") or not os.path.isfile(path):
        return ok("token file", "none needed")
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        return warning("token file", f"{path} can be read by other users of this machine", f"chmod 600 {path}")
    return ok("token file", f"{path}, for its owner only")
