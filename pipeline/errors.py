"""Errors that a job reports in one line. UserError (wrong input) is defined in
`models.errors`, because imports go pipeline -> models."""

from models.errors import UserError, nearest, plural, shorten

__all__ = [
    "TRY_LATER",
    "InUse",
    "JobFailed",
    "NotRead",
    "NotStarted",
    "NotStartedInTime",
    "NotWritten",
    "StorageError",
    "Unavailable",
    "UserError",
    "nearest",
    "plural",
    "shorten",
]

TRY_LATER = 75
"""Exit code for a temporary failure: the same command may succeed later (EX_TEMPFAIL of sysexits.h)."""


class StorageError(UserError):
    """The store is unreachable or responds incorrectly. Unlike with wrong input, a retry may succeed."""


class Unavailable(StorageError):
    """The store did not respond before the timeout."""

    exit_code = TRY_LATER


class NotStarted(UserError):
    """Ray does not start on this machine."""

    exit_code = 1


class NotStartedInTime(NotStarted):
    """Ray did not start before the timeout, as on a busy machine."""

    exit_code = TRY_LATER


class NotRead(UserError):
    """An input can no longer be read, for example because it was removed during the work."""

    exit_code = 1


class NotWritten(UserError):
    """An output can no longer be written, for example because the disk is full."""

    exit_code = 1


class InUse(UserError):
    """Another process uses the same output."""

    exit_code = TRY_LATER


class JobFailed(Exception):
    """The work failed permanently. The job prints the message and exits with code 1."""
