"""Command lines, recipes, and configs as YAML.

A config is a frozen dataclass. A recipe is a function that returns a config, often derived from another recipe with
`dataclasses.replace`. The flags of a job are the fields of its config (`--optimizer.lr 1e-3`) and override the recipe:

    config = parse(argv, RECIPES, default="demo", prog="jobs/pretrain.py", description=__doc__)

Precedence, lowest first: recipe (`--recipe NAME`) or saved config (`--config FILE.yaml`), then flags.
"""

import contextlib
import dataclasses
import errno
import hashlib
import inspect
import io
import json
import logging
import math
import os
import re
import select
import signal
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import psutil
import yaml

from pipeline import cluster, credentials, help, logs, ray_watch, stops, storage
from pipeline.errors import JobFailed, UserError, nearest, plural

Config = TypeVar("Config")
logger = logging.getLogger(__name__)
MAX_CONFIG_BYTES = 1 << 20


# ---------------------------------------------------------------- command lines


def parse(
    argv: list[str], recipes: Mapping[str, Callable[[], Config]], default: str, *, prog: str, description: str
) -> Config:
    """The config for a command line; see `parse_recipe`."""
    return parse_recipe(argv, recipes, default, prog=prog, description=description)[0]


def parse_recipe(
    argv: list[str], recipes: Mapping[str, Callable[[], Config]], default: str, *, prog: str, description: str
) -> tuple[Config, Config, str]:
    """The config for a command line, the recipe config before any overrides, and the name of the recipe.

    --help, --help-all and --list-recipes print their text and raise SystemExit(0). Raises UserError for an unknown flag
    or recipe (the message suggests the nearest one), for a value of the wrong type and for a bad --config file."""
    base = help.ArgumentParser(add_help=False)
    base.add_argument("--recipe", default=None)
    base.add_argument("--config", default=None)
    base.add_argument("-h", "--help", action="store_true")
    base.add_argument("--help-all", action="store_true")
    base.add_argument("--list-recipes", action="store_true")
    chosen, flags = base.parse_known_args(credentials.take_from_arguments(argv))
    if chosen.list_recipes:
        print(help.list_recipes(recipes, default), end="")
        raise SystemExit(0)
    if chosen.recipe and chosen.config:
        raise UserError("--recipe and --config are mutually exclusive; give one of them")
    name = chosen.recipe or default
    if name not in recipes:
        raise help.unknown_recipe(name, recipes)
    start = recipe_config = recipes[name]()
    if chosen.config:
        start = from_yaml(type(start), _read_config(chosen.config), where=chosen.config)
    if chosen.help or chosen.help_all:
        about: dict[str, Any] = {"recipes": list(recipes), "recipe": name, "everything": chosen.help_all}
        print(help.help_text(start, prog=prog, description=description, **about), end="")
        raise SystemExit(0)
    help.check_flags(flags, start)
    flags = help.for_tyro(flags, start)
    config = _from_flags(type(start), flags, prog=prog, default=start)
    return with_dependent_values(config, start), recipe_config, name


def parse_command(argv: list[str], command: type[Config], *, prog: str, description: str) -> Config:
    """The flags of a job that has no recipes, as an instance of the dataclass `command`.

    --help prints its text and raises SystemExit(0). Raises UserError for an unknown or missing flag, and for a value of
    the wrong type.
    """
    flags = credentials.take_from_arguments(argv)
    if {"-h", "--help", "--help-all"} & set(flags):
        print(help.help_text(command, prog=prog, description=description, everything="--help-all" in flags), end="")
        raise SystemExit(0)
    help.check_flags(flags, command)
    return _from_flags(command, help.for_tyro(flags, command), prog=prog)


def with_dependent_values(config: Config, start: Config) -> Config:
    """The config with the values that depend on those that differ from `start`, such as the training crop on the image
    size. A config class computes its own in a method of this name."""
    if hasattr(config, "with_dependent_values"):
        config = config.with_dependent_values(start)
    nested = {
        field.name: with_dependent_values(getattr(config, field.name), getattr(start, field.name))
        for field in dataclasses.fields(config)  # type: ignore[arg-type]
        if dataclasses.is_dataclass(getattr(config, field.name))
    }
    return dataclasses.replace(config, **nested) if nested else config  # type: ignore[type-var]


def _from_flags(cls: type[Config], flags: Sequence[str], **options: Any) -> Config:
    """The config that tyro makes of the flags. Raises UserError with the text of the error that tyro prints in a box."""
    import tyro  # imported late: too slow for --help

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return check_finite(tyro.cli(cls, args=flags, **options))
    except SystemExit as ended:
        if ended.code != 2:
            raise
        raise UserError(f"{help.error_in_box(printed.getvalue())}; --help-all lists the flags") from None


def _read_config(uri: str) -> str:
    """The text of a --config file. Raises UserError if the file is missing or is not text."""
    try:
        data = storage.read_bytes(uri, 0, MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise UserError(f"--config {uri}: more than {MAX_CONFIG_BYTES:,} bytes; no configuration is that large")
        return data.decode()
    except FileNotFoundError:
        raise UserError(f"--config {uri}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--config {uri} cannot be read: {error}") from error


def summary(function: Callable) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def run_job(main: Callable[[list[str]], int | None]) -> typing.NoReturn:
    """Runs a job's `main(argv)` and exits with a documented code.

    0: success; 1: failure; 2: wrong input; 75: temporary failure (a store is unavailable, Ray did not start in time, or
    another process uses the output); 129: the terminal was closed; 130: Ctrl-C; 141: the reader of the output has ended; 143: SIGTERM."""
    stops.handle_signals()
    ray_watch.enable()
    logs.setup()
    code: str | int | None
    try:
        hide_passwords()
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except Exception as error:
        code = _report(error)
    except (KeyboardInterrupt, SystemExit) as ended:
        code = _report(ended) if ray_watch.ended() else stops.exit_code(ended)
        if code in (130, 128 + signal.SIGTERM, 128 + signal.SIGHUP):
            with contextlib.suppress(OSError):  # Ctrl-C may also have ended the `tee` that reads the output
                print("stopped; repeat the command to continue", file=sys.stderr)
            _exit_now(code)
    if ray_watch.ended():
        _exit_now(int(code or 0))  # disconnecting would wait for the process that has ended
    cluster.disconnect()
    sys.exit(code)


def _report(error: BaseException) -> int:
    """Prints the line for an error that ends a job. Returns the exit code; raises an error that only a traceback explains."""
    if ended := ray_watch.ended():  # whatever failed, failed because of it
        logger.debug("Ray has ended", exc_info=error)
        print(f"error: {ended}", file=sys.stderr)
        return 1
    if isinstance(error, UserError | JobFailed):
        # Ray wraps an error raised in a task; the original is its cause.
        error = getattr(error, "cause", error)
        print(f"error: {credentials.redacted(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, JobFailed) else getattr(error, "exit_code", 2)
    if not isinstance(error, OSError):
        raise error
    cause = getattr(error, "cause", error)
    if isinstance(cause, BrokenPipeError) and _output_is_closed():
        sys.exit(128 + signal.SIGPIPE)
    is_full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not is_full and cause.filename is None:
        raise error
    logger.debug("file system error", exc_info=cause)
    full = ": free some space" if is_full else ""
    print(f"error: {cause}{full}; repeat the command to continue", file=sys.stderr)
    return 1


def _output_is_closed() -> bool:
    """Whether the reader of standard output, such as `head`, has ended. If so, the remaining output is discarded."""
    poll = select.poll()
    poll.register(1, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return is_closed


def hide_passwords() -> None:
    """Moves passwords from addresses to environment variables. If a flag holds a password, the process restarts without
    it, because command lines are visible to all users of the machine."""
    credentials.take_from_environment()
    given = sys.argv[1:]
    cleaned = credentials.take_from_arguments(given)
    if cleaned != given:
        logger.warning(
            "a password or a signed query in a flag is briefly visible in the process list and stays in the shell history; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or VIT_URL_QUERIES, instead"
        )
        os.execv(sys.executable, [*sys.orig_argv[: len(sys.orig_argv) - len(given)], *cleaned])


def _exit_now(code: int) -> typing.NoReturn:
    """Kills the child processes and exits immediately. A normal interpreter exit shuts Ray down while other threads
    still wait in it, which may crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    ray_watch.release()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(code)


# ---------------------------------------------------------------- written form


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass or mapping as plain values for YAML or JSON. Tuples become lists."""
    return json.loads(json.dumps(dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(cls: type[Config], text: str, where: str = "config") -> Config:
    """The config that `to_yaml` wrote. Raises UserError naming an unknown key and the nearest valid one."""
    try:
        values = credentials.take_from_values(yaml.safe_load(text), where)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: for example an invalid date
        raise UserError(f"{where}: not valid YAML: {yaml_problem(error)}") from None
    return from_dict(cls, values, where)


def yaml_problem(error: Exception) -> str:
    """What is wrong with a YAML document, and where, without its text: it may be another file, and have a password."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "nested too deeply" if isinstance(error, RecursionError) else _unquoted(str(error).partition(";")[0])
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{_unquoted(error.problem or error.context or 'an error')}"


def _unquoted(text: str) -> str:
    """A message in one line, without the parts of the document in it. Single signs, which are syntax, are kept."""
    return re.sub(
        r"(['\"])(.*?)\1",
        lambda found: found[0] if len(found[2]) < 2 or found[2][0] == "<" else "...",
        " ".join(text.split()),
    )


def shown(value: Any) -> str:
    """A value of a file, for an error: a number or a word as it is, anything longer by its kind."""
    if isinstance(value, str):
        return repr(value) if re.fullmatch(r"[\w.%/+\-]{0,24}", value) else f"text of {plural(len(value), 'character')}"
    if isinstance(value, (int, float)) or value is None:
        return f"{value!r:.40}"
    kinds = {"dict": "a mapping", "list": "a list", "tuple": "a list"}
    return kinds.get(type(value).__name__, f"a {type(value).__name__}")


def check_finite(config: Config, where: str = "") -> Config:
    """The config. Raises UserError, which names the field, for a number in it that is infinite or not a number."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if dataclasses.is_dataclass(value):
            waiting += [(f"{name}.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
        elif isinstance(value, Mapping):
            waiting += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(name, item) for item in value]
        elif isinstance(value, float) and not math.isfinite(value):
            field = name.removeprefix(".").removeprefix("runtime.")
            raise UserError(f"{where}{field} {value} must be a finite number")
    return config


def from_dict(cls: type[Config], values: Any, where: str = "config") -> Config:
    if dataclasses.is_dataclass(cls) and not isinstance(values, dict):
        kind = "an empty file" if values is None else "text" if isinstance(values, str) else shown(values)
        raise UserError(f"{where}: expected a mapping with the keys of {cls.__name__}, found {kind}")
    return check_finite(_read(cls, values, where), f"{where}: ")


def _read(hint: Any, value: Any, where: str) -> Any:
    """`value` from YAML as the annotated type `hint`.

    No library is used: pydantic ignores unknown keys of a dataclass and converts `true` to 1."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping with the keys of {hint.__name__}, found {shown(value)}")
        hints = typing.get_type_hints(hint)
        for key in value:
            if key not in hints:
                raise UserError(f'{where}: unknown key "{key!s:.40}"{nearest(str(key), hints)}')
        return hint(**{key: _read(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in (a for a in arguments if a is not type(None)):
            try:
                return _read(option, value, where)
            except UserError as error:
                errors.append(str(error))
        raise UserError("; ".join(errors))
    if origin is typing.Literal:
        if value not in arguments:
            options = ", ".join(str(argument) for argument in arguments)
            raise UserError(
                f"{where}: {shown(value)} is not one of {options}{nearest(str(value), map(str, arguments))}"
            )
        return value
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
            if len(value) != len(arguments):
                raise UserError(f"{where}: expected {plural(len(arguments), 'value')}, found {len(value)}")
            return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
        return origin(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {_read(arguments[0], k, where): _read(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML parses 1e-3 (without a dot) as a string
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {shown(value)}")


def diff(config: Any, base: Any) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value in base, value in config)} for the values that differ."""
    new, old = flatten(to_dict(config)), flatten(to_dict(base))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b.c": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def fingerprint(value: Any) -> str:
    """A 12-character hex hash of a config or a JSON-serializable value."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- horizons

_HORIZON = re.compile(
    r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*(steps?|epochs?|examples?|%)?\s*", re.IGNORECASE
)


def steps(
    horizon: str | int, *, batch_size: int, examples_per_epoch: int | None = None, total_steps: int | None = None
) -> int:
    """Converts a horizon ("10000", "10000steps", "7epochs", "5e6examples" or "10%") to optimiser steps, rounded.

    Raises UserError when the text cannot be parsed or a number that its unit needs is missing (epochs need
    `examples_per_epoch`, percent needs `total_steps`).
    """
    match = _HORIZON.fullmatch(str(horizon))
    if not match:
        raise UserError(f'"{horizon}" is not a length of training; write 10000steps, 7epochs, 5e6examples or 10%')
    amount, unit = float(match[1]), (match[2] or "steps").lower().rstrip("s")
    if not math.isfinite(amount * (examples_per_epoch or 1)):
        raise UserError(f'the length "{horizon}" is too large')
    if unit == "step":
        return round(amount)
    if unit == "example":
        return round(amount / batch_size)
    if unit == "epoch":
        if examples_per_epoch is None:
            raise UserError(f'"{horizon}" needs the size of the data set, which is unknown; give steps instead')
        return round(amount * examples_per_epoch / batch_size)
    if total_steps is None:
        raise UserError(
            f'"{horizon}" is relative to the length of the run; give the length in steps, epochs or examples'
        )
    return round(amount / 100 * total_steps)
