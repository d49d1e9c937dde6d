"""The JSON schema of a pipeline file, generated from the dataclasses that read it, for checks and completion in editors.

pydantic is not used, because its schema of a dataclass does not allow references (`${stage.output}`).
"""

import dataclasses
import types
import typing
from typing import Any

from pipeline import help
from pipeline.graph import fields, kinds
from pipeline.graph.file import PROMOTE, Pipeline, Promotion, Stage


def schema() -> dict[str, Any]:
    """The schema, in draft 2020-12. The job of a stage determines its valid fields."""
    jobs = [kind for kind in kinds.KINDS if kind != PROMOTE]
    stage = _object(Stage, required=["job"])
    stage["properties"]["job"]["enum"] = jobs
    stage["allOf"] = [_of_job(name) for name in jobs]
    whole = _object(Pipeline, required=["name", "stages"])
    whole["properties"]["stages"] |= {"additionalProperties": {"$ref": "#/$defs/stage"}, "minProperties": 1}
    over = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    promotion = _object(Promotion, required=["over"])
    promotion["properties"]["over"] |= over
    promotion["properties"]["over"].pop("type", None)
    promotion["properties"]["over"].pop("items", None)
    whole["properties"]["promote"] = promotion
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Pipeline of vit-pipeline",
        **whole,
        "$defs": {"stage": stage},
    }


def _of_job(name: str) -> dict[str, Any]:
    """The valid fields of a stage with that job."""
    kind = kinds.KINDS[name]
    texts = _texts(kinds.config_class(kind))
    known = fields.paths(kinds.config_class(kind))
    properties = {key: _field(hint, texts.get(key, "")) for key, (_, hint) in known.items()}
    groups = {key.partition(".")[0] for key in known if "." in key}
    properties |= {group: {"type": "object"} for group in groups}
    then: dict[str, Any] = {
        "fields": {"properties": properties, "additionalProperties": False},
        "matrix": {"propertyNames": {"enum": [*known, "recipe"]}},
    }
    if recipes := kinds.recipe_names(kind):
        then["recipe"] = {"enum": recipes}
    return {"if": {"properties": {"job": {"const": name}}}, "then": {"properties": then}}


def _texts(cls: Any) -> dict[str, str]:
    """{dotted field: its description}"""
    found: dict[str, str] = {}
    for key, (path, _) in fields.paths(cls).items():
        owner = cls
        for part in path[:-1]:
            hint = typing.get_type_hints(owner)[part]
            owner = hint
        found[key] = help.field_texts(owner).get(path[-1], "")
    return found


def _field(hint: Any, text: str) -> dict[str, Any]:
    """A value of that type, or a string with a reference."""
    plain = _type(hint)
    if typing.get_origin(hint) in (tuple, list):
        plain = {"anyOf": [plain, *([plain["items"]] if "items" in plain else [])]}
    with_reference = {"type": "string", "pattern": r"\$\{.+\}"}
    described = {"anyOf": [plain, with_reference]}
    return {**described, "description": text} if text else described


def _object(cls: Any, required: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    texts = help.field_texts(cls)
    properties = {
        field.name: {**_type(hints[field.name]), **({"description": texts[field.name]} if field.name in texts else {})}
        for field in dataclasses.fields(cls)
    }
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _type(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _object(hint, required=[])
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type(argument) for argument in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return {
            "type": "array",
            "prefixItems": [_type(a) for a in arguments],
            "minItems": len(arguments),
            "maxItems": len(arguments),
        }
    if origin in (tuple, list):
        return {"type": "array", "items": _type(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    simple = {int: "integer", float: "number", bool: "boolean", str: "string", types.NoneType: "null"}
    if hint is float:
        return {"type": ["number", "string"]}  # YAML parses 1e-3, without a dot, as a string
    if hint is str:
        return {"type": ["string", "number"]}
    return {"type": simple[hint]} if hint in simple else {}
