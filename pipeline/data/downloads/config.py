"""Settings of downloads, and the reasons for which a download fails."""

import ipaddress
from dataclasses import dataclass, fields
from typing import Literal

from pipeline.errors import UserError

CONTENT = ("max_bytes", "robots", "hash_column")
"""The settings that affect which images a dataset has. The others may change when a job is continued."""

TEMPORARY = frozenset({"timeout", "connection failed", "incomplete body", "bad response", "robots.txt unreachable"})
TEMPORARY_STATUS = frozenset({408, 421, 425, 429, 500, 502, 503, 504, 507, *range(520, 528), 529, 530})
"""HTTP status codes of temporary errors: RFC 9110, and those of Cloudflare for an unreachable origin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """How the images of a list of URLs are downloaded."""

    connections: int = 64
    """Concurrent requests per process. There are two processes per CPU core."""
    per_host: int = 8
    """Concurrent requests to one host from all processes of a node."""
    rate: float | None = None
    """Requests per second to one host from all processes of a node. None: no limit, apart from a Crawl-delay in its
    robots.txt."""
    retries: int = 2
    """Retries after a temporary failure, such as a time-out or status 503."""
    passes: int = 1
    """Further passes over all temporary failures, after the rest of the list."""
    connect_timeout: float = 10.0
    """Seconds to connect."""
    stall_timeout: float = 15.0
    """Seconds without data after which a request fails."""
    timeout: float = 60.0
    """Time limit in seconds for a request and its response."""
    max_wait: float = 60.0
    """Longest wait that a server may ask for (Retry-After), in seconds; its other images then fail for this pass."""
    max_bytes: int = 32 << 20
    """Size of an image file, in bytes; larger ones are rejected as soon as the size is known."""
    max_redirects: int = 5
    """Maximum number of redirects; each target is checked like the first address."""
    robots: Literal["obey", "headers", "ignore"] = "obey"
    """Requests of site owners: obey robots.txt and the X-Robots-Tag directives noai, noimageai, noindex and
    noimageindex; headers: obey X-Robots-Tag only; ignore: ignore both."""
    user_agent: str = "vit-pipeline/0.1"
    """User agent of the requests. Add an address at which site owners reach you, such as
    "name/1.0 (+https://example.org/crawler)"; the part before the slash is the name in robots.txt."""
    private_networks: tuple[str, ...] = ()
    """Private networks whose hosts may be reached, such as 10.1.0.0/16."""
    hash_column: str | None = None
    """Column with the SHA-256, SHA-1 or MD5 of each file, in hex or base64. None: a column with the name of a hash
    (sha256, md5, ...); "none": do not check."""

    @property
    def robot_name(self) -> str:
        """The product token of the user agent, by which robots.txt and X-Robots-Tag address a robot."""
        return self.user_agent.partition("/")[0].strip().lower()


def check_downloads(config: DownloadConfig) -> None:
    """Raises UserError, naming the flag, for an invalid value."""
    least: dict[str, float] = {"connections": 1, "per_host": 1, "retries": 0, "passes": 0, "max_bytes": 1}
    least |= {"max_redirects": 0, "max_wait": 0}
    for field in fields(config):
        value, flag = getattr(config, field.name), f"--download.{field.name.replace('_', '-')}"
        if field.name in least and not value >= least[field.name]:
            raise UserError(f"{flag} {value}: at least {least[field.name]}")
        if field.name in ("connect_timeout", "stall_timeout", "timeout") and not 0 < value < 86_400:
            raise UserError(f"{flag} {value}: above 0 and below a day, in seconds")
    if config.rate is not None and not 0 < config.rate < 1e6:
        raise UserError(f"--download.rate {config.rate}: above 0, in requests per second")
    if config.connections > 4096:
        raise UserError(f"--download.connections {config.connections}: at most 4096")
    if not config.robot_name or not config.user_agent.isprintable() or not config.user_agent.isascii():
        raise UserError(f"--download.user-agent {config.user_agent!r}: a name in plain ASCII, such as name/1.0")
    for network in config.private_networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise UserError(f"--download.private-networks {network}: {error}; write it as 10.1.0.0/16") from None


def is_temporary(reason: str) -> bool:
    """Whether another attempt may succeed after a failure with this reason."""
    code = reason.removeprefix("http ")
    return reason in TEMPORARY or (code != reason and code.isdigit() and int(code) in TEMPORARY_STATUS)
