"""What a job reports in one line. UserError, "the input is wrong", is defined in `models.errors`: imports go pipeline -> models."""

from models.errors import UserError, nearest, shorten

__all__ = ["JobFailed", "StorageError", "UserError", "nearest", "shorten"]


class StorageError(UserError):
    """The store cannot be reached or does not answer as it should: another attempt may succeed, unlike with other wrong input."""


class JobFailed(Exception):
    """Work failed for good, for a reason that one line says: a job prints it and ends with exit code 1."""
