"""Passwords in addresses: they move into environment variables before anything can show or store the address.

`http://user:password@host` is accepted for MLflow, S3 endpoints and proxies, as a flag or in the environment. A flag is
in the process list, and a configuration is written into checkpoints, runs and logs, so `config.run_job` and `config.parse`
call `take_from_arguments` and `take_from_environment` first:

    MLflow over HTTP     MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD
    MLflow's database    VIT_DATABASE_PASSWORD; the user name stays in the address
    S3 endpoint          AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY

Proxies keep theirs, because HTTP libraries read it there; `redacted` hides it in every message.
"""

import os
import re
import urllib.parse
from collections.abc import Sequence

DATABASE_PASSWORD = "VIT_DATABASE_PASSWORD"
MLFLOW_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
S3_ADDRESSES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL")

_ADDRESS_FIELD = re.compile(r"""(\btracking_uri["']?\s*:\s*["']?)([^\s"',}]+)""")
_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][\w+.\-]*)://(?P<userinfo>[^/?#\s\"']*)@")


def redacted(text: str) -> str:
    """The text with whatever stands before the `@` of each address replaced by `***`."""
    return _USERINFO.sub(lambda found: f"{found['scheme']}://***@", text)


def take_password(address: str) -> str:
    """The MLflow address without its password, which goes into the environment; other text is returned as it is.

    Credentials that the environment holds already win over those of the address, as in MLflow's own client.
    """
    found = _USERINFO.match(address)
    if not found:
        return address
    scheme, rest = found["scheme"], address[found.end() :]
    user, has_password, password = found["userinfo"].partition(":")
    if scheme in ("http", "https"):
        if not (os.environ.get("MLFLOW_TRACKING_USERNAME") and os.environ.get("MLFLOW_TRACKING_PASSWORD")):
            os.environ["MLFLOW_TRACKING_USERNAME"] = urllib.parse.unquote(user)
            os.environ["MLFLOW_TRACKING_PASSWORD"] = urllib.parse.unquote(password)
        return f"{scheme}://{rest}"
    if has_password:
        os.environ[DATABASE_PASSWORD] = urllib.parse.unquote(password)
    return f"{scheme}://{user}@{rest}"


def with_password(address: str) -> str:
    """The address of a database with the password that `take_password` took out of it, for the database's driver alone."""
    found = _USERINFO.match(address)
    password = os.environ.get(DATABASE_PASSWORD)
    if not found or not password or ":" in found["userinfo"] or found["scheme"] in ("http", "https"):
        return address
    quoted = urllib.parse.quote(password, safe="")
    return f"{found['scheme']}://{found['userinfo']}:{quoted}@{address[found.end() :]}"


def take_from_environment() -> None:
    """Takes the passwords out of the addresses of MLflow and of S3 in this process's environment."""
    for name in MLFLOW_ADDRESSES:
        if os.environ.get(name):
            os.environ[name] = take_password(os.environ[name])
    for name in S3_ADDRESSES:
        found = _USERINFO.match(os.environ.get(name, ""))
        if found:
            key, _, secret = found["userinfo"].partition(":")
            if not os.environ.get("AWS_ACCESS_KEY_ID"):
                os.environ["AWS_ACCESS_KEY_ID"] = urllib.parse.unquote(key)
                os.environ["AWS_SECRET_ACCESS_KEY"] = urllib.parse.unquote(secret)
            os.environ[name] = f"{found['scheme']}://{os.environ[name][found.end() :]}"


def take_from_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without passwords: those of `--tracking-uri` go into the environment."""
    cleaned, is_address = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if is_address:
            argument = take_password(argument)
        elif equals and _is_address_flag(flag):
            argument = f"{flag}={take_password(value)}"
        is_address = not equals and _is_address_flag(flag)
        cleaned.append(argument)
    return cleaned


def take_from_yaml(text: str) -> str:
    """The text of a configuration, the passwords of whose `tracking_uri` fields go into the environment."""
    return _ADDRESS_FIELD.sub(lambda found: found[1] + take_password(found[2]), text)


def _is_address_flag(flag: str) -> bool:
    return flag.replace("_", "-").endswith("tracking-uri") and flag.startswith("--")
