"""What a check reports."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    """The result of a check. `where` is the node, if it is not this machine."""

    check: str
    status: Literal["ok", "warning", "error"]
    message: str
    remedy: str = ""
    where: str = ""


def ok(check: str, message: str) -> CheckResult:
    return CheckResult(check=check, status="ok", message=message)


def warning(check: str, message: str, remedy: str) -> CheckResult:
    return CheckResult(check=check, status="warning", message=message, remedy=remedy)


def error(check: str, message: str, remedy: str) -> CheckResult:
    return CheckResult(check=check, status="error", message=message, remedy=remedy)


def refused(check: str, cause: UserError) -> CheckResult:
    """Converts a UserError to a result. The text after the semicolon is the remedy."""
    message, _, remedy = str(cause).partition("; ")
    return error(check, message, remedy)
