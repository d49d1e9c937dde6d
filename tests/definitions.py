"""Kubernetes' resource definitions as JSON Schema that refuses unknown keys, as the API server does."""

from pathlib import Path
from typing import Any

import jsonschema
import yaml


def validator(path: Path, version: str) -> tuple[str, jsonschema.Draft202012Validator]:
    """(kind, validator of its resources) of a definition's file, for one of its versions."""
    spec = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
    (found,) = [one for one in spec["versions"] if one["name"] == version]
    schema = strict(found["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return spec["names"]["kind"], jsonschema.Draft202012Validator(schema)


def strict(schema: Any) -> Any:
    """A definition's schema as JSON Schema that also refuses unknown keys."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: strict(value) for key, value in schema.items() if key not in ("description", "default", "format")}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        # properties is a map of names to schemas: a field may itself be named "format" or "default"
        result["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        result["additionalProperties"] = False
    return result
