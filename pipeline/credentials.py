"""Moves passwords from addresses to environment variables, before an address is shown or stored.

`http://user:password@host` is accepted for MLflow in a flag, a file or the environment, and for S3 endpoints, proxies
and the webhook in the environment. Flags are visible in the process list, and configurations are written to
checkpoints, runs and logs. Therefore `config.run_job` and the readers of configurations first call
`take_from_arguments`, `take_from_environment` and `take_from_values`:

    MLflow over HTTP     MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD
    MLflow's database    VIT_DATABASE_PASSWORD; the user name stays in the address
    S3 endpoint          AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
    https://             VIT_URL_QUERIES: a signed query (`?sig=...`), which the store sends with the address again
    az://                AZURE_STORAGE_SAS_TOKEN: a signed query

Proxies and the webhook keep their passwords in the environment; `redacted` hides them in messages. A password in any
other address (a source, a checkpoint, a hook, HF_ENDPOINT, RAY_ADDRESS) is refused, and so is a token in place of a user
of an https:// address."""

import base64
import json
import os
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError

DATABASE_PASSWORD = "VIT_DATABASE_PASSWORD"
SAS_TOKEN = "AZURE_STORAGE_SAS_TOKEN"
QUERIES = "VIT_URL_QUERIES"
"""Environment variable: JSON of {address of a file or folder: signed query}."""
MLFLOW_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
S3_ADDRESSES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL")
REMEDIES = {  # variables with an address that must not have a login: where the login belongs
    "HF_ENDPOINT": "HF_TOKEN",
    "STORAGE_EMULATOR_HOST": "GOOGLE_APPLICATION_CREDENTIALS",
    "RAY_ADDRESS": "RAY_AUTH_TOKEN",
    "RAY_API_SERVER_ADDRESS": "RAY_AUTH_TOKEN",
}

# Up to the last @ before the path, so that a / in a password does not begin a path.
_USERINFO = re.compile(
    r"(?P<scheme>[A-Za-z][\w+.\-]*)://(?P<userinfo>[^/?#\s\"']*|[^/?#\s\"':@]*:(?!\d*[/?#])[^\s\"'@]*)@"
)
# The same at the beginning of a separate address, which may contain quotes.
_WHOLE = re.compile(r"(?P<scheme>[A-Za-z][\w+.\-]*)://(?P<userinfo>[^/?#]*|[^/?#:@]*:(?!\d*[/?#])[^@]*)@", re.DOTALL)
_KEYS = r"api[_\-]?key|account[_\-]?key|access[_\-]?key(?:[_\-]?id)?|private[_\-]?key"
_SECRET_NAMES = rf"(?:[\w.\-]*(?:password|passwd|pwd|token|secret|signature|credentials?|{_KEYS})|sig|auth|jwt|code)"
# A parameter `key` is a secret if its value is like a key: long, and not the name of a file.
_QUERY = re.compile(
    rf"([?&;](?:{_SECRET_NAMES}=|key=(?=[\w+~%=\-]{{20,}}(?:[&;\s\"'#]|$))))([^&;\s\"'#]+)", re.IGNORECASE
)
_NO_SCHEME = "http+x://"
_SIGNED = re.compile(r"(?P<address>(?:https?|az)://[^\s\"'?#]+)\?(?P<query>[^\s\"'#]+)")
# Tokens of Hugging Face, Google, GitHub, GitLab and Slack, at any position.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|ya29\.[\w\-]{16,}|AIza[\w\-]{30,}|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|"
    r"glpat-[\w\-]{16,}|xox[a-z]-[\w\-]{10,})"
)


def redacted(text: str) -> str:
    """The text with `***` in place of the login in each address, of secrets in its parameters, and of tokens."""
    text = _QUERY.sub(r"\1***", _USERINFO.sub(lambda found: f"{found['scheme']}://***@", text))
    return _TOKEN.sub("***", text)


def take_queries(text: str) -> str:
    """The text without the signed queries of its https:// and az:// addresses, which are moved to VIT_URL_QUERIES and
    AZURE_STORAGE_SAS_TOKEN. Queries without a secret are kept. Raises UserError for two addresses that differ only in
    their queries, such as `?id=1&sig=...` and `?id=2&sig=...`: without them they would be one.
    """

    def take(found: re.Match[str]) -> str:
        if not _QUERY.search(f"?{found['query']}"):
            return found[0]
        if found["address"].startswith("az://"):
            os.environ[SAS_TOKEN] = found["query"]
            return found["address"]
        queries, place = _queries(), found["address"].rstrip("/")
        if place in queries and _public(queries[place]) != _public(found["query"]):
            raise UserError(
                f"{place}: two files of this address differ only in their queries; give them in two commands"
            )
        os.environ[QUERIES] = json.dumps(queries | {place: found["query"]})
        return found["address"]

    return _SIGNED.sub(take, text)


def _public(query: str) -> list[str]:
    """The parameters of a query that are no secrets and not part of a signature."""
    parameters = (part for part in query.split("&") if not _QUERY.search(f"?{part}"))
    signed = ("x-amz-", "x-goog-", "expires", "awsaccesskeyid", "googleaccessid", "policy", "key-pair-id")
    sas = ("sv", "se", "st", "sp", "sr", "spr", "ss", "srt", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv")
    return [p for p in parameters if not p.lower().startswith(signed) and p.partition("=")[0] not in sas]


def with_query(address: str) -> str:
    """An address with the query that `take_queries` removed from it or from its folder. Only for requests."""
    for place, query in sorted(_queries().items(), key=lambda item: -len(item[0])):
        if address == place or address.startswith(f"{place}/"):
            return f"{address}{'&' if '?' in address else '?'}{query}"
    return address


def _queries() -> dict[str, str]:
    """{address: its query}. Raises UserError when VIT_URL_QUERIES is something else."""
    try:
        queries = json.loads(os.environ.get(QUERIES) or "{}")
    except (ValueError, RecursionError):
        queries = None
    if not isinstance(queries, dict) or not all(isinstance(value, str) for value in queries.values()):
        raise UserError(f'{QUERIES}: write {{"https://host/folder": "sig=..."}}')
    return queries


def take_password(address: str) -> str:
    """The MLflow address without its password, which is moved to the environment; other text is unchanged.

    Credentials that are already in the environment take precedence, as in MLflow's client."""
    address = _take_database_parameter(address)
    found = _WHOLE.match(address)
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


def _take_database_parameter(address: str) -> str:
    """The address of a database without the parameter `password=...`, which is moved to the environment."""
    if address.partition("://")[0] in ("http", "https") or "?" not in address:
        return address
    place, _, query = address.partition("?")
    kept = []
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        if name.lower() in ("password", "passwd"):
            os.environ[DATABASE_PASSWORD] = urllib.parse.unquote_plus(value)
        else:
            kept.append(parameter)
    return f"{place}?{'&'.join(kept)}" if kept else place


def with_password(address: str) -> str:
    """The address of a database with the password that `take_password` removed. Only for the database driver."""
    found = _USERINFO.match(address)
    password = os.environ.get(DATABASE_PASSWORD)
    if not found or not password or ":" in found["userinfo"] or found["scheme"] in ("http", "https"):
        return address
    quoted = urllib.parse.quote(password, safe="")
    return f"{found['scheme']}://{found['userinfo']}:{quoted}@{address[found.end() :]}"


def split_login(address: str) -> tuple[str, dict[str, str]]:
    """(an HTTP address without user and password, the header that contains them)."""
    found = _WHOLE.match(address)
    if not found:
        return address, {}
    login = base64.b64encode(urllib.parse.unquote(found["userinfo"]).encode()).decode()
    return f"{found['scheme']}://{address[found.end() :]}", {"Authorization": f"Basic {login}"}


def take_from_environment() -> None:
    """Moves passwords from the addresses of MLflow and S3 in the environment to their own variables. Raises UserError for
    a login in an address that has none."""
    for name, remedy in REMEDIES.items():
        if _WHOLE.match(_with_scheme(os.environ.get(name, ""))):
            raise UserError(
                f"{name}: a login in the address would be visible to others; give the address without it, and the token or key in {remedy}"
            )
    for name in MLFLOW_ADDRESSES:
        if os.environ.get(name):
            os.environ[name] = take_password(os.environ[name])
    for name in S3_ADDRESSES:
        found = _WHOLE.match(os.environ.get(name, ""))
        if found:
            key, _, secret = found["userinfo"].partition(":")
            if not os.environ.get("AWS_ACCESS_KEY_ID"):
                os.environ["AWS_ACCESS_KEY_ID"] = urllib.parse.unquote(key)
                os.environ["AWS_SECRET_ACCESS_KEY"] = urllib.parse.unquote(secret)
            os.environ[name] = f"{found['scheme']}://{os.environ[name][found.end() :]}"


def take_from_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without passwords. A password in `--tracking-uri` and signed queries are moved to the
    environment. Raises UserError for a password in the address of another flag."""
    cleaned, is_address, last = [], False, "the command line"
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            last = flag
        if is_address:
            argument = take_password(argument)
        elif equals and _is_address_flag(flag):
            argument = f"{flag}={take_password(value)}"
        elif _is_command(last):
            refuse_query(argument, last)
        else:
            argument = take_queries(argument)
        refuse_password(argument, last)
        is_address = not equals and _is_address_flag(flag)
        cleaned.append(argument)
    return cleaned


def take_from_values(values: Any, where: str) -> Any:
    """Removes passwords from the values of a configuration file, in place: those in `tracking_uri` are moved to the
    environment. Raises UserError, which names the key, for a password in another address."""
    seen: set[int] = set()  # YAML aliases can refer to one list a billion times
    waiting: list[tuple[Any, str]] = [(values, where)]
    while waiting:
        value, name = waiting.pop()
        if not isinstance(value, (dict, list)) or id(value) in seen:
            continue
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if isinstance(item, str):
                if isinstance(value, dict) and isinstance(key, str) and key.endswith("tracking_uri"):
                    value[key] = item = take_password(item)
                elif isinstance(key, str) and _is_command(key):
                    refuse_query(item, f"{name}.{key}")
                else:
                    value[key] = item = take_queries(item)
                refuse_password(item, f"{name}.{key}")
            else:
                waiting.append((item, f"{name}.{key}"))
    return values


def refuse_password(text: str, where: str) -> None:
    """Raises UserError for text that contains an address with a password, or an http(s):// address with a user, which may
    be a token. where: its flag or key."""
    found = next(filter(_is_login, _USERINFO.finditer(text)), None)
    if found:
        raise UserError(
            f"{where}: a password in the address {redacted(found[0])}... would be visible in process lists and "
            "records; give the address without it, and the password in an environment variable (S3: AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY)"
        )


def _is_login(found: re.Match[str]) -> bool:
    web = found["scheme"].lower().startswith("http")
    return ":" in found["userinfo"] or (web and bool(found["userinfo"]) and not found["userinfo"].startswith("***"))


def refuse_query(text: str, where: str) -> None:
    """Raises UserError for a secret in a query of a command. where: its flag or key."""
    if _QUERY.search(text):
        raise UserError(
            f"{where}: a secret in {redacted(text)} would be visible in process lists and records; put the command into a "
            "script that reads it from the environment"
        )


def without_logins(values: Any) -> Any:
    """A copy of plain values (mappings, lists, text) without the passwords in their addresses: http://host in place of
    http://me:password@host, postgresql://me@host in place of postgresql://me:password@host."""
    if isinstance(values, dict):
        return {key: without_logins(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [without_logins(value) for value in values]
    if not isinstance(values, str):
        return values

    def shown(found: re.Match[str]) -> str:
        user = "" if _is_login(found) and found["scheme"].startswith("http") else found["userinfo"].partition(":")[0]
        return f"{found['scheme']}://{user}{'@' if user else ''}"

    return _QUERY.sub(r"\1***", _USERINFO.sub(shown, values))


def forwarded(names: Sequence[str]) -> dict[str, str]:
    """The environment variables of these names that are set, with addresses without logins. For Ray, which shows them."""
    return {
        name: without_logins(_with_scheme(os.environ[name])).removeprefix(_NO_SCHEME)
        for name in names
        if name in os.environ
    }


def _with_scheme(address: str) -> str:
    """An address as a URL: me:password@host, too."""
    return address if "://" in address else _NO_SCHEME + address


def _is_command(name: str) -> bool:
    return name.endswith("hook")


def _is_address_flag(flag: str) -> bool:
    return flag.replace("_", "-").endswith("tracking-uri") and flag.startswith("--")
