"""Expands stages to instances, one per combination of the `matrix` of a stage and of the stages it refers to.

A `transfer` stage that reads `${pretrain.output}` has one instance per instance of `pretrain`; `${pretrain.*.output}`
expands to all of them, in a field that takes several values."""

import dataclasses
import functools
import graphlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import config as configuration
from pipeline import storage
from pipeline.errors import UserError, nearest
from pipeline.graph import fields, kinds
from pipeline.graph.file import PROMOTE, Pipeline, Stage
from pipeline.graph.kinds import Kind
from pipeline.graph.references import INSTANCE, data_of
from pipeline.graph.state import FOLDER

MOST = 10_000  # limit on the instances of a pipeline
REFERENCE = re.compile(r"\$\{([^}]*)\}")
Axes = tuple[tuple[str, str], ...]
"""The value, as text, of each axis ("stage.field") of an instance."""


@dataclass(frozen=True, slots=True)
class Address:
    """A URI in a field: literal text, or the output of another instance with a path below it."""

    text: str
    instance: str | None = None
    below: str = ""
    covers: tuple[str, ...] = ()
    """Instances whose outputs, as named in the file, lie in the folder at this URI."""


@dataclass(kw_only=True, slots=True)
class Instance:
    """An instance of a stage. Values contain references to outputs until it starts."""

    name: str
    stage: str
    kind: Kind
    recipe: str | None
    config: Any
    """Config with references, as in the file."""
    given: dict[str, Any]
    """Fields of the file, by dotted name, with references to outputs."""
    reads: dict[str, tuple[Address, ...]]
    observes: dict[str, tuple[Address, ...]]
    needs: tuple[str, ...]
    """Names of the instances that have to finish first."""
    after: tuple[str, ...] = ()
    """Those of `needs` that no field refers to."""
    output: str | None = None
    """The URI in the file; None: a folder named after the identity."""
    axes: Axes = ()
    retries: int = 1
    cpus: float | None = None
    gpus: float = 0.0
    memory: float = 1.0
    decides: dict[str, Any] = field(default_factory=dict)
    """The part of the config that affects the output, as plain values, without URIs."""
    label: str = ""
    """The part of the name in brackets, as part of a path."""


def expand(pipeline: Pipeline, where: str = "pipeline") -> dict[str, Instance]:
    """{name: instance} in topological order. Raises UserError for an invalid pipeline."""
    stages = dict(pipeline.stages)
    found: dict[str, list[Instance]] = {}
    count = 0
    for name in _order(pipeline, where):
        place = f"{where}: stage {name}"
        found[name] = _instances(name, stages[name], found, pipeline, place)
        count += len(found[name])
        if count > MOST:
            raise UserError(f"{where}: more than {MOST:,} instances of stages; make the matrix of {name} smaller")
    if pipeline.promote:
        found[PROMOTE] = [_promotion(pipeline, found, where)]
    instances = {instance.name: instance for group in found.values() for instance in group}
    _check_outputs(pipeline, instances, where)
    return _connect(instances, where)


# ---------------------------------------------------------------- topological order


def _order(pipeline: Pipeline, where: str) -> list[str]:
    """Names of the stages in topological order. Raises UserError for unknown references and cycles."""
    needs = {name: _needed(name, stage, pipeline, where) for name, stage in pipeline.stages.items()}
    order: list[str] = []
    state: dict[str, int] = {}
    for first in needs:
        path = [first]
        while path:
            name = path[-1]
            if state.get(name) == 2:
                path.pop()
                continue
            state[name] = 1
            left = [other for other in needs[name] if state.get(other) != 2]
            if not left:
                state[name] = 2
                order.append(name)
                path.pop()
            elif state.get(left[0]) == 1:
                circle = [*path[path.index(left[0]) :], left[0]]
                raise UserError(f"{where}: the stages depend on each other in a cycle: {' -> '.join(circle)}")
            else:
                path.append(left[0])
    return order


def _needed(name: str, stage: Stage, pipeline: Pipeline, where: str) -> list[str]:
    place = f"{where}: stage {name}"
    needed = list(stage.after)
    for other in stage.after:
        if other not in pipeline.stages:
            raise UserError(f'{place}: after: no stage "{other}"{nearest(other, pipeline.stages)}')
    for text in _texts([stage.fields, stage.matrix]):
        if "${" in REFERENCE.sub("", text):
            raise UserError(f"{place}: {text}: incomplete reference; write ${{STAGE.output}}")
        if "$<" in text:
            raise UserError(f"{place}: {text}: a value must not contain $<")
        for reference in REFERENCE.findall(text):
            head, _, rest = reference.partition(".")
            if head in ("matrix", "pipeline"):
                continue
            if head not in pipeline.stages:
                raise UserError(f'{place}: ${{{reference}}}: no stage "{head}"{nearest(head, pipeline.stages)}')
            if rest not in ("output", "*.output"):
                raise UserError(
                    f"{place}: ${{{reference}}}: only the output of a stage can be referenced; write ${{{head}.output}}, or "
                    f"${{{head}.*.output}} for all its instances"
                )
            needed.append(head)
    for other in needed:
        if other == name:
            raise UserError(f"{where}: the stages depend on each other in a cycle: {name} -> {name}")
    return list(dict.fromkeys(needed))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


# ---------------------------------------------------------------- one stage


@dataclass(frozen=True, slots=True)
class _Template:
    """The common part of the instances of a stage."""

    name: str
    stage: Stage
    kind: Kind
    given: Mapping[str, Any]
    all_of: Mapping[str, list[Instance]]
    """{stage: all its instances}, for stages that this stage needs as a whole."""
    pipeline: Pipeline
    place: str


def _instances(
    name: str, stage: Stage, found: Mapping[str, list[Instance]], pipeline: Pipeline, place: str
) -> list[Instance]:
    kind = kinds.find(stage.job, place)
    given = fields.flat(stage.fields, kinds.config_class(kind), place)
    matrix = _matrix(stage, kind, given, place)
    references = [r for text in _texts([given, matrix]) for r in REFERENCE.findall(text)]
    outputs = [r for r in references if r.endswith(".output") and r.partition(".")[0] in found]
    one = sorted({r.partition(".")[0] for r in outputs if not r.endswith(".*.output")})
    many = [r.partition(".")[0] for r in outputs if r.endswith(".*.output")] + stage.after
    upstream = _join([(other, found[other]) for other in one])
    template = _Template(name, stage, kind, given, {other: found[other] for other in many}, pipeline, place)
    count = math.prod(map(len, matrix.values())) * len(upstream)
    if count > MOST:
        raise UserError(f"{place}: {count:,} instances; the limit is {MOST:,}")
    made = []
    for axes, ups in upstream:
        for chosen in itertools.product(*matrix.values()):
            values = dict(zip(matrix, chosen, strict=True))
            own = tuple((f"{name}.{key}", _short(value)) for key, value in values.items())
            made.append(_instance(template, values, ups, (*axes, *own)))
    if len({instance.name for instance in made}) < len(made):
        raise UserError(f"{place}: two combinations of the matrix are equal; list each value once")
    return made


def _matrix(stage: Stage, kind: Kind, given: Mapping[str, Any], place: str) -> dict[str, list[Any]]:
    """{dotted field or recipe: values}."""
    values = {key.replace("-", "_"): list(items) for key, items in stage.matrix.items()}
    for key, items in values.items():
        if not items:
            raise UserError(f"{place}: matrix.{key} has no values")
        if key != "recipe":
            known = fields.paths(kinds.config_class(kind))
            if key not in known:
                raise UserError(f'{place}: matrix: unknown field "{key}"{nearest(key, [*known, "recipe"])}')
        if key in given or (key == "recipe" and stage.recipe):
            raise UserError(f"{place}: {key} is given both in the matrix and outside it; give it once")
    return values


def _join(upstream: Sequence[tuple[str, list[Instance]]]) -> list[tuple[Axes, dict[str, Instance]]]:
    """All consistent choices of one instance per stage: instances with equal values on common axes go together."""
    joined: list[tuple[Axes, dict[str, Instance]]] = [((), {})]
    for stage, instances in upstream:
        axes_here = {axis for axis, _ in instances[0].axes}
        common = [axis for axis, _ in joined[0][0] if axis in axes_here]
        by_common: dict[tuple[str, ...], list[Instance]] = {}
        for instance in instances:
            values = dict(instance.axes)
            by_common.setdefault(tuple(values[axis] for axis in common), []).append(instance)
        longer: list[tuple[Axes, dict[str, Instance]]] = []
        for axes, ups in joined:
            values = dict(axes)
            for instance in by_common.get(tuple(values[axis] for axis in common), ()):
                more = tuple(pair for pair in instance.axes if pair[0] not in values)
                longer.append(((*axes, *more), {**ups, stage: instance}))
        joined = longer
    return joined


def _instance(template: _Template, chosen: Mapping[str, Any], ups: Mapping[str, Instance], axes: Axes) -> Instance:
    """One instance of a stage.

    chosen: values of its own matrix. ups: the instance of each stage of which it refers to a single one.
    """
    stage, kind, place, pipeline = template.stage, template.kind, template.place, template.pipeline
    recipe = chosen.get("recipe", stage.recipe)
    values = {**template.given, **{key: value for key, value in chosen.items() if key != "recipe"}}
    known = fields.paths(kinds.config_class(kind))
    words = {f"matrix.{key}": [str(value)] for key, value in chosen.items()}
    words |= {"pipeline.name": [pipeline.name], "pipeline.output": [pipeline.root]}
    words |= {f"{other}.output": [f"$<{up.name}>"] for other, up in ups.items()}
    words |= {f"{other}.*.output": [f"$<{up.name}>" for up in group] for other, group in template.all_of.items()}
    given = {
        key: _substitute(value, words, f"{place}.{key}", fields.takes_many(known[key][1]))
        for key, value in values.items()
    }
    config = fields.with_values(kinds.start(kind, recipe, given, place), given, place)
    if kind.recipe_flag == "suite" and recipe and config.suite != recipe:
        raise UserError(f"{place}: recipe {recipe} and suite {config.suite} conflict; give one of them")
    kinds.check_config(kind, config, place)
    output = given.pop("output", None)
    reads = {key: found for key in kind.reads if (found := _addresses(_value(kind, key, config)))}
    observes = {key: found for key in kind.observes if (found := _addresses(fields.get(config, key)))}
    inside = [i for text in _texts(list(given.values())) for i in INSTANCE.findall(text)]
    after = [up.name for other in stage.after for up in template.all_of[other]]
    resources, label = stage.resources, _label(axes)
    return Instance(
        name=f"{template.name}[{label}]" if label else template.name,
        stage=template.name,
        kind=kind,
        recipe=recipe,
        config=config,
        given=given,
        reads=reads,
        observes=observes,
        needs=tuple(dict.fromkeys([*inside, *after])),
        after=tuple(after),
        output=output,
        axes=axes,
        retries=pipeline.retries if stage.retries is None else stage.retries,
        cpus=kind.cpus(config) if resources.cpus is None else resources.cpus,
        gpus=kind.gpus(config) if resources.gpus is None else resources.gpus,
        memory=1.0 if resources.memory is None else resources.memory,
        decides=_decides(kind, config),
        label=label,
    )


def _substitute(value: Any, words: Mapping[str, list[str]], place: str, many: bool) -> Any:
    """Replaces the references in a value. many: whether the field takes several values."""
    if isinstance(value, list | tuple):
        parts = [_substitute(item, words, place, many) for item in value]
        return [one for part in parts for one in (part if isinstance(part, list) else [part])]
    if not isinstance(value, str) or "${" not in value:
        return value
    texts = [""]
    at = 0
    for match in REFERENCE.finditer(value):
        before, reference = value[at : match.start()], match[1]
        at = match.end()
        if reference not in words:
            raise UserError(f"{place}: ${{{reference}}}: unknown reference{nearest(reference, words)}")
        texts = [text + before + option for text in texts for option in words[reference]]
    texts = [text + value[at:] for text in texts]
    if len(texts) == 1 and "*" not in value:
        return texts[0]
    if not many:
        raise UserError(f"{place}: {value} expands to {len(texts)} outputs, but this field takes one")
    return texts


def _value(kind: Kind, key: str, config: Any) -> Any:
    """The value of a field that has addresses; of a mixture, the addresses of its data sets."""
    if (kind.name, key) == ("pretrain", "data"):
        return [uri for uri, _ in data_of(config)]
    return fields.get(config, key)


def _addresses(value: Any) -> tuple[Address, ...]:
    texts = [value] if isinstance(value, str) else list(value or ())
    found = []
    for text in texts:
        match = INSTANCE.match(text)
        if match:
            found.append(Address(text, match[1], text[match.end() :].strip("/")))
        elif text:
            found.append(Address(text))
    return tuple(found)


def _decides(kind: Kind, config: Any) -> dict[str, Any]:
    plain = config.identity if kind.name == "pretrain" else configuration.to_dict(config)
    flat = configuration.flatten(plain)
    if kind.name == "pretrain" and len(parts := data_of(config)) > 1:
        flat["mixture"] = [str(share) for _, share in parts]
    left_out = {*kind.reads, *kind.observes, *kind.ignores, "output"}
    return {key: value for key, value in flat.items() if key not in left_out}


@functools.cache
def defaults(kind: Kind) -> dict[str, Any]:
    """The values that affect the output, for a job with default fields only."""
    given = dict.fromkeys((f.name for f in dataclasses.fields(kinds.config_class(kind))), "")
    base = kinds.config_class(kind)() if kind.recipes else kinds.start(kind, None, given, kind.name)
    return _decides(kind, base)


# ---------------------------------------------------------------- names


def _short(value: Any) -> str:
    """A matrix value as part of a name: 0.001, Ti-8, 0.3+0.9."""
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    text = re.sub(r"[^A-Za-z0-9_.+=-]+", "-", text)
    return text if len(text) <= 32 else f"{text[:24]}-{configuration.fingerprint(text)[:6]}"


def _label(axes: Axes) -> str:
    """A label such as lr=0.001,seed=1; with the dotted field, or the stage and the field, where labels would collide."""
    names = [axis.rpartition(".")[2] for axis, _ in axes]
    if len(set(names)) < len(names):
        names = [axis.partition(".")[2] for axis, _ in axes]
    if len(set(names)) < len(names):
        names = [axis for axis, _ in axes]
    return ",".join(f"{name}={text}" for name, (_, text) in zip(names, axes, strict=True))


# ---------------------------------------------------------------- promotion, and checks across stages


def _promotion(pipeline: Pipeline, found: Mapping[str, list[Instance]], where: str) -> Instance:
    rule, place = pipeline.promote, f"{where}: promote"
    assert rule is not None
    for stage in rule.over:
        if stage not in found:
            raise UserError(f'{place}.over: no stage "{stage}"{nearest(stage, found)}')
        if found[stage][0].kind.name != "transfer":
            raise UserError(f"{place}.over: {stage} is a {found[stage][0].kind.name}; over takes transfer stages")
        _check_metric(rule.metric, stage, found[stage], place)
    scores = [f"$<{instance.name}>" for stage in rule.over for instance in found[stage]]
    kind = kinds.KINDS[PROMOTE]
    given: dict[str, Any] = {"model": pipeline.name, "scores": scores, "metric": rule.metric}
    given |= {"at_least": rule.at_least, "no_worse_than": rule.no_worse_than, "margin": rule.margin or None}
    given = {key: value for key, value in given.items() if value is not None}
    config = fields.with_values(kinds.start(kind, None, given, place), given, place)
    return Instance(
        name=PROMOTE,
        stage=PROMOTE,
        kind=kind,
        recipe=None,
        config=config,
        given=given,
        reads={"scores": _addresses(scores)},
        observes={},
        needs=tuple(i for text in scores for i in INSTANCE.findall(text)),
        after=(),
        retries=pipeline.retries,
        cpus=1.0,
        decides=_decides(kind, config),
    )


def _check_metric(metric: str, stage: str, transfers: Sequence[Instance], place: str) -> None:
    """Raises UserError for a metric that the stage does not produce, if its tasks are known before the transfers."""
    known = [kinds.task_names(instance.config) for instance in transfers]
    names = {name for tasks in known for name in tasks or ()}
    if metric != "mean" and None not in known and metric.rpartition("/")[2] not in names:
        raise UserError(f'{place}.metric: {stage} has no score "{metric}"{nearest(metric, ["mean", *names])}')


def _connect(instances: dict[str, Instance], where: str) -> dict[str, Instance]:
    """Turns literal URIs inside the output of another instance into references. Returns the instances in order."""
    outputs = {instance.output: name for name, instance in instances.items() if instance.output is not None}
    changed = False
    for name, instance in instances.items() if outputs else ():
        for group in (instance.reads, instance.observes):
            for field_name, addresses in group.items():
                group[field_name] = tuple(_linked(address, name, outputs) for address in addresses)
        found = [n for g in (instance.reads, instance.observes) for many in g.values() for a in many for n in _named(a)]
        needs = tuple(dict.fromkeys([*instance.needs, *found]))
        changed = changed or needs != instance.needs
        instance.needs = needs
    if not changed:
        return instances
    try:
        order = list(graphlib.TopologicalSorter({n: i.needs for n, i in instances.items()}).static_order())
    except graphlib.CycleError as error:
        raise UserError(f"{where}: the stages depend on each other in a cycle: {' -> '.join(error.args[1])}") from error
    return {name: instances[name] for name in order}


def _linked(address: Address, reader: str, outputs: Mapping[str, str]) -> Address:
    if address.instance is not None or re.match(r"[a-z]+:(?!//)", address.text):
        return address
    uri = storage.normalise(address.text)
    for output, name in outputs.items():
        if name != reader and (uri == output or uri.startswith(output + "/")):
            return Address(address.text, name, uri.removeprefix(output).strip("/"))
    covered = tuple(name for output, name in outputs.items() if name != reader and output.startswith(uri + "/"))
    return Address(address.text, covers=covered)


def _named(address: Address) -> tuple[str, ...]:
    return address.covers or ((address.instance,) if address.instance else ())


def _check_outputs(pipeline: Pipeline, instances: Mapping[str, Instance], where: str) -> None:
    """Raises UserError for equal or nested outputs and for an output inside an input."""
    root = pipeline.root
    given = {}
    taken = {f"{root}/{FOLDER}": "the pipeline keeps its state"}
    taken |= {f"{root}/{one.stage}": f"stage {one.stage} writes" for one in instances.values() if one.output is None}
    for instance in instances.values():
        if instance.output is None:
            continue
        if INSTANCE.search(instance.output):
            raise UserError(
                f"{where}: stage {instance.stage}: its output lies in the output of another stage; give a separate folder"
            )
        instance.output = storage.normalise(instance.output)
        given[instance.name] = instance.output
        if instance.output == root or root.startswith(instance.output + "/"):
            raise UserError(
                f"{where}: stage {instance.stage}: its output {instance.output} contains the output of the pipeline; give a separate folder"
            )
        for folder, what in taken.items():
            if f"{instance.output}/".startswith(f"{folder}/"):
                raise UserError(
                    f"{where}: stage {instance.stage}: its output {instance.output} lies in {folder}, where {what}; give "
                    "a separate folder"
                )
    ordered = sorted((f"{uri}/", name) for name, uri in given.items())
    for (uri, name), (other, second) in itertools.pairwise(ordered):
        if other.startswith(uri):
            raise UserError(
                f"{where}: the output of {second} ({other.rstrip('/')}) lies in that of {name} ({uri.rstrip('/')}); give each "
                "a separate folder" + (", such as one with ${matrix.FIELD} in it" if other == uri else "")
            )
    for name, instance in instances.items():
        for address in (a for group in instance.reads.values() for a in group if a.instance is None):
            if ":" in address.text.partition("/")[0] and not storage.is_remote(address.text):
                continue  # models:/..., timm:..., the built-in digits
            source = storage.normalise(address.text) + "/"
            for uri, other in ordered:
                if uri.startswith(source) and instance.kind.name in ("prepare", "vtab"):
                    raise UserError(
                        f"{where}: the output of {other} ({uri.rstrip('/')}) lies in the input of {name} ({source.rstrip('/')})"
                    )
