"""The exception that means "the input is wrong". It is defined in `models.errors`, since imports go pipeline -> models."""

from models.errors import UserError, nearest, shorten

__all__ = ["UserError", "nearest", "shorten"]


class JobFailed(Exception):
    """Work failed for good, for a reason that one line says: a job prints it and ends with exit code 1."""
