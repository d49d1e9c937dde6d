"""What a job reports in one line. UserError, "the input is wrong", is defined in `models.errors`: imports go pipeline -> models."""

from models.errors import UserError, nearest, shorten

__all__ = [
    "TRY_LATER",
    "InUse",
    "JobFailed",
    "NotStarted",
    "StorageError",
    "Unavailable",
    "UserError",
    "nearest",
    "shorten",
]

TRY_LATER = 75
"""Exit code: nothing is wrong with the input, and the same command may succeed later (EX_TEMPFAIL of sysexits.h)."""


class StorageError(UserError):
    """The store cannot be reached or does not answer as it should: another attempt may succeed, unlike with other wrong input."""


class Unavailable(StorageError):
    """The store has not answered in all the time that is given to it."""

    exit_code = TRY_LATER


class NotStarted(UserError):
    """Ray does not start on this machine, which may be busy: another attempt may succeed."""

    exit_code = 1


class InUse(UserError):
    """Somebody else works in the same output."""

    exit_code = TRY_LATER


class JobFailed(Exception):
    """Work failed for good, for a reason that one line says: a job prints it and ends with exit code 1."""
