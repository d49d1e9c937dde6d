"""--help, --help-all, --list-recipes and the errors of command lines, for all jobs. Imports neither tyro nor torch.

tyro's own help is not used: it shows all flags at once, does not support recipes, and is slow to import. The help of a
flag is the string below the field in its config class."""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from pipeline.errors import UserError, nearest

WIDTH = 80
COMMON = (
    *(
        "checkpoint",
        "to",
        "source",
        "suite",
        "runs",
        "model",
        "data",
        "validation",
        "output",
        "splits",
        "labels",
        "tasks",
        "random_encoder",
    ),
    *("steps", "batch_size", "image_size", "model.variant", "optimizer.lr", "workers", "gpus", "gpu", "price", "mfu"),
    *("seeds", "lrs", "resolution", "every", "once", "fail_on_regression", "prune", "delete"),
    *("size", "sample", "encoding", "deduplicate", "decontaminate"),
    *("images", "classes", "corpus_images", "cores", "scaling", "dry_run", "json"),
)
"""The flags that --help shows if the job has them, most common first."""
MOST_COMMON = 10
SHORT = 12
"""--help shows all flags of a job with at most this many flags."""
# Flags of other tools -> flags of this project with the same meaning. The first one that the job has is suggested; {}
# is the given value.
SYNONYMS = {
    ("epoch", "epochs", "max-epochs", "num-epochs", "num-train-epochs"): ("steps {}epochs",),
    ("examples", "samples", "num-samples"): ("steps {}examples",),
    ("iters", "iterations", "max-iters", "max-steps", "num-steps", "total-steps"): ("steps {}",),
    ("lr", "learning-rate", "base-lr", "peak-lr"): ("optimizer.lr {}", "lrs {}"),
    ("wd", "wdecay", "weight-decay"): ("optimizer.weight-decay {}",),
    ("opt", "optim"): ("optimizer.name {}",),
    ("clip-grad", "grad-clip", "gradient-clipping", "max-grad-norm"): ("optimizer.clip {}",),
    ("warmup-epochs",): ("schedule.warmup {}epochs",),
    ("warmup-iters", "warmup-steps"): ("schedule.warmup {}",),
    ("sched", "lr-scheduler", "scheduler"): ("schedule.kind {}",),
    ("batch", "bs", "total-batch-size"): ("batch-size {}",),
    ("size", "img-size", "imgsz", "input-size", "res"): ("image-size {}", "resolution {}", "size {}"),
    ("input",): ("source {}", "data {}"),
    ("train", "data-dir", "data-path", "dataset", "train-data"): ("data {}", "source {}"),
    ("val", "val-data", "valid", "eval-data"): ("validation {}",),
    ("out", "out-dir", "output-dir", "save-dir"): ("output {}",),
    ("ckpt", "checkpoint-path", "weights"): ("checkpoint {}", "init-from {}"),
    ("pretrained", "finetune"): ("init-from {}", "checkpoint {}"),
    ("arch", "model", "model-name"): ("model.variant {}", "variant {}"),
    ("drop-path-rate", "stochastic-depth"): ("model.drop-path {}",),
    ("num-workers",): ("threads {}", "workers {}"),
    ("amp", "dtype", "fp16", "bf16", "mixed-precision"): ("engine.precision {}",),
    ("zero-stage", "stage"): ("engine.zero {}",),
    ("grad-checkpointing", "gradient-checkpointing"): ("engine.activation-checkpointing",),
    ("ema", "model-ema", "model-ema-decay"): ("ema-decay {}",),
    ("smoothing",): ("label-smoothing {}",),
    ("ngpus", "num-gpus", "n-gpus"): ("gpus {}",),
}


SIZES = {"tiny": "ti", "small": "s", "base": "b", "large": "l", "huge": "h"}
SWITCH = "yes|no"
SWITCH_WORDS = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """A flag: its dotted field, its value in the recipe, and its help text."""

    name: str
    value: Any
    kind: str
    """Placeholder for the value in the help text: N (integer), X (float) or TEXT."""
    choices: tuple[Any, ...]
    text: str
    required: bool = False
    positional: bool = False
    optional: bool = False
    """Whether the value may be None."""

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def negative(self) -> str:
        """The flag that sets False or None: --engine.no-compile."""
        group, dot, last = self.flag.removeprefix("--").rpartition(".")
        return f"--{group}{dot}no-{last}"


def options_of(config: Any, prefix: str = "") -> list[Option]:
    """All flags of a config, or of a config class with its defaults. Flags of nested configs replace their parent."""
    cls: Any = config if isinstance(config, type) else type(config)
    hints, texts = typing.get_type_hints(cls), field_texts(cls)
    annotated = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(config):
        value, name = _value(config, field), prefix + field.name
        notes = getattr(annotated[field.name], "__metadata__", ())
        if dataclasses.is_dataclass(value):
            # tyro.conf.arg(name="") puts the fields of a nested config among those of its parent
            plain = any(getattr(note, "name", None) == "" for note in notes)
            found += options_of(value, prefix if plain else f"{name}.")
        else:
            hint = hints[field.name]
            required, positional = (
                value is dataclasses.MISSING,
                any("positional" in str(note).lower() for note in notes),
            )
            value = None if required else value
            text = texts.get(field.name, "")
            optional = type(None) in typing.get_args(hint)
            found.append(Option(name, value, _kind(hint), _choices(hint), text, required, positional, optional))
    return found


def _value(config: Any, field: dataclasses.Field) -> Any:
    """The value of a field, or its default if `config` is a class; MISSING if there is no default."""
    if not isinstance(config, type):
        return getattr(config, field.name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) in (tuple, list):
        first, *more = typing.get_args(hint)
        return f"{_kind(first)} ..." if Ellipsis in more or not more else " ".join(map(_kind, (first, *more)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(_kind(argument) for argument in typing.get_args(hint) if argument is not type(None))
    return {int: "N", float: "X", bool: SWITCH}.get(hint, "TEXT")


def _choices(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(choice for argument in typing.get_args(hint) for choice in _choices(argument))
    return ()


@functools.cache
def field_texts(cls: Any) -> dict[str, str]:
    """{field: the string below it} of a dataclass and its bases."""
    texts: dict[str, str] = {}
    base: Any
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(typing.cast(Any, base)))).body
        except (OSError, TypeError, SyntaxError, ValueError):  # a class without a source file
            continue
        statements = getattr(body, "body", [])
        for field, text in itertools.pairwise(statements):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    texts[name] = " ".join(words.split())
    return texts


def help_text(
    config: Any, *, prog: str, description: str, recipes: Sequence[str] = (), recipe: str = "", everything: bool = False
) -> str:
    """The text of --help (the common flags) or --help-all (all flags, in groups), at most 80 columns wide.

    recipes: names of all recipes; empty for a job without recipes. recipe: the recipe whose values are the defaults."""
    options = options_of(config)
    everything = everything or len(options) <= SHORT
    by_name = {option.name: option for option in options}
    names = [option.name for option in options if option.positional]
    names += [option.name for option in options if option.required and not option.positional]
    names += [name for name in COMMON if name in by_name and name not in names][: MOST_COMMON - len(names)]
    others = sorted((option.name for option in options if option.name not in names), key=lambda name: "." in name)
    names += others[: MOST_COMMON - len(names)]
    taken = "".join(f" {by_name[name].flag}" for name in names if by_name[name].positional)
    lines = [f"usage: python {prog}{taken} [--flag value ...]", ""]
    for paragraph in inspect.cleandoc(description).split("\n\n"):
        lines += [*_paragraph(paragraph), ""]
    lines.pop()
    lines += ["", "flags:" if len(options) <= MOST_COMMON else "common flags:"]
    for name in names:
        lines += _option_lines(by_name[name])
    rest = [option for option in options if option.name not in names]
    if everything:
        groups: dict[str, list[Option]] = {}
        for option in rest:
            groups.setdefault(option.name.rpartition(".")[0], []).append(option)
        for group, members in groups.items():
            lines += ["", f"{group or 'more'}:"]
            for option in members:
                lines += _option_lines(option)
    if recipes:
        lines += ["", "defaults:"]
        if len(recipes) > 1:
            text = f"Start from the values of a recipe. --list-recipes shows all {len(recipes)}. (here: {recipe})"
            lines += _entry("--recipe NAME", text)
        lines += _entry("--config FILE.yaml", "Start from the config.yaml of an earlier run.")
    if not everything and rest:
        lines += ["", *_entry("--help-all", f"Also show the other {len(rest)} flags.")]
    return "\n".join(lines) + "\n"


def _paragraph(text: str) -> list[str]:
    """Wraps a paragraph. Indented examples keep their line breaks."""
    if not text.startswith(" "):
        return textwrap.wrap(text, WIDTH)
    return [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH, subsequent_indent=" " * 8)]


def _option_lines(option: Option) -> list[str]:
    value = option.value
    if option.kind == SWITCH:
        return _entry(option.flag, f"{option.text} {_switch(option)}".strip())
    shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else value
    default = " (required)" if option.required else "" if value in (None, "", (), [], {}) else f" (default: {shown})"
    if default and option.optional:
        default = f"{default[:-1]}; {option.negative} for None)"
    kind = "|".join(map(str, option.choices)) or option.kind
    left = option.flag if option.positional else f"{option.flag} {kind}"
    return _entry(left, f"{option.text}{default}".strip())


def _switch(option: Option) -> str:
    return f"(default: yes; {option.negative} turns it off)" if option.value else ""


def _entry(left: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, WIDTH - 26, break_on_hyphens=False)
    first = textwrap.wrap(f"  {left}", WIDTH, subsequent_indent="      ", break_on_hyphens=False)
    if wrapped and len(first) == 1 and len(first[0]) < 25:
        first[0] = f"{first[0]:26s}{wrapped.pop(0)}"
    return [*first, *(" " * 26 + line for line in wrapped)]


def families(recipes: Iterable[str]) -> list[tuple[str, list[str]]]:
    """[(family, names)]: recipes grouped by the second part of their name. The family "" holds recipes without a
    group."""
    found: dict[str, list[str]] = {}
    for name in recipes:
        found.setdefault((name + "_").split("_")[1] or name.partition("-")[0], []).append(name)
    alone = [name for names in found.values() if len(names) == 1 for name in names]
    return [("", alone), *((family, names) for family, names in found.items() if len(names) > 1)]


def first_sentence(function: Callable) -> str:
    """The first sentence of a docstring, without its full stop."""
    doc = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    return doc.partition(". ")[0].rstrip(".")


def list_recipes(recipes: Mapping[str, Callable[[], Any]], default: str) -> str:
    """The text of --list-recipes: recipes by family, each with the first sentence of its docstring."""
    lines = [f"recipes (--recipe NAME; default {default}):"]
    for family, names in families(recipes):
        lines += ["", f"{family}:"] if family else []
        for name in names:
            lines += _entry(name, first_sentence(recipes[name]))
    return "\n".join(lines) + "\n"


def check_flags(arguments: Iterable[str], config: Any) -> None:
    """Raises UserError for the first unknown flag, with a suggestion, and for a missing required flag."""
    options = {option.name.replace("_", "-"): option for option in options_of(config)}
    nested = tuple(f"{name}." for name, option in options.items() if isinstance(option.value, dict))
    arguments = list(arguments)
    for i, argument in enumerate(arguments):
        name, _, value = argument.removeprefix("--").replace("_", "-").partition("=")
        if not argument.startswith("--") or argument == "--":
            continue
        group, dot, last = name.rpartition(".")
        plain = group + dot + last.removeprefix("no-")
        if name in options or plain in options or name.startswith(nested):
            continue
        following = arguments[i + 1] if i + 1 < len(arguments) and not arguments[i + 1].startswith("--") else ""
        raise UserError(f"unknown flag --{name}{_meant(name, value or following, options)}; --help-all lists them")
    for name, option in options.items():
        given = any(argument.partition("=")[0].replace("_", "-") == f"--{name}" for argument in arguments)
        if option.required and not option.positional and not given:
            raise UserError(f"--{name} is required ({option.text.rstrip('.')}); --help shows the command")


def for_tyro(arguments: Sequence[str], config: Any) -> list[str]:
    """The arguments in the form that tyro reads: --no-NAME of an option that may be None as --NAME None, and a switch
    with a word (--NAME yes) or without one as tyro's --NAME True, or --NAME and --no-NAME."""
    options = options_of(config)
    negatives = {option.negative: option for option in options if option.optional}
    switches = {option.flag: option for option in options if option.kind == SWITCH}
    words: list[str] = []
    taken = False  # the next argument is the word of a switch
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, equals, word = argument.partition("=")
        flag = flag.replace("_", "-") if argument.startswith("--") else ""
        if taken:
            taken = False
        elif flag in negatives and not equals:
            option = negatives[flag]
            words += [option.flag, str(False if option.kind == SWITCH else None)]
        elif flag in switches:
            option = switches[flag]
            word = (word if equals else following).lower()
            is_word = word in SWITCH_WORDS or (word == "none" and option.optional)
            if equals and not is_word:
                raise UserError(f"{argument}: expected {option.flag}, or {option.flag} no")
            taken = is_word and not equals
            value = SWITCH_WORDS.get(word) if is_word else True
            words += [option.flag, str(value)] if option.optional else [option.flag if value else option.negative]
        else:
            words.append(argument)
    return words


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors of one line, instead of a page of usage. Without abbreviations of flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def error_in_box(printed: str) -> str:
    """The error of tyro as one line, from the box in which tyro prints it with the help of the flag."""
    inside = (line.strip("│ ") for line in printed.splitlines() if line.startswith("│"))
    text = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), inside)).rstrip(".")
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
    text = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)
    return text.removeprefix("Error parsing ") or " ".join(printed.split())


def _meant(name: str, value: str, options: Mapping[str, Option]) -> str:
    if model := re.match(r"vit_(tiny|small|base|large|huge)_patch(\d+)", value):  # timm's name
        value = f"{SIZES[model[1]].title()}/{model[2]}"
    for synonym in next((flags for names, flags in SYNONYMS.items() if name in names), ()):
        if synonym.partition(" ")[0] in options:
            return f" (did you mean --{synonym.format(value).strip()}?)"
    # Users tend to remember the last part of a dotted name.
    inside = [option for option in options if option.rpartition(".")[2] == name.rpartition(".")[2]]
    close = inside or difflib.get_close_matches(name, options, 1)
    return f" (did you mean --{close[0]}?)" if close else ""


def unknown_recipe(name: str, recipes: Collection[str]) -> UserError:
    """Suggests the recipes of a model, such as ViT-B/16 or vit_base_patch16_224, or the recipe with the nearest name."""
    plain = re.sub(r"^vit[-_ ]?|[-_]?patch|[/ ]", "", name.lower())
    for size, short in SIZES.items():
        plain = re.sub(rf"^{size}[-_]?", short, plain)
    words = re.split("[-_]", plain)
    found = [recipe for recipe in recipes if recipe.startswith(f"{words[0]}_")]
    found = [recipe for recipe in found if set(words[1:]) & set(re.split("[-_]", recipe))] or found
    misspelt = difflib.get_close_matches(name, recipes, 1, cutoff=0.85)
    hint = f" (did you mean {' or '.join(found[:3])}?)" if found and not misspelt else nearest(name, recipes)
    return UserError(f'unknown recipe "{name}"{hint}; --list-recipes shows them all')
