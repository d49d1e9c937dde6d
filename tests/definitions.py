"""Kubernetes' resource definitions as JSON Schema that refuses unknown keys, as the API server does.

python -m tests.definitions FOLDER         downloads those of KubeRay and Kueue; VIT_DEFINITIONS=FOLDER for the tests
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SOURCES = {
    "kuberay-1.6.2": ("https://github.com/ray-project/kuberay", "v1.6.2", "ray-operator/config/crd/bases"),
    "kuberay-1.7.0": ("https://github.com/ray-project/kuberay", "v1.7.0", "ray-operator/config/crd/bases"),
    "kueue-0.19.2": ("https://github.com/kubernetes-sigs/kueue", "v0.19.2", "config/components/crd/bases"),
}
"""{folder of the definitions: (repository, tag, folder in it)}"""
KUBERAY = ("1.6.2", "1.7.0")
KUEUE = "0.19.2"


def definitions(name: str) -> Path | None:
    """The folder of one of SOURCES in VIT_DEFINITIONS; of KubeRay 1.7.0 also in VIT_REAL_DATA."""
    places = [Path(os.environ["VIT_DEFINITIONS"], name)] if "VIT_DEFINITIONS" in os.environ else []
    if name == "kuberay-1.7.0" and "VIT_REAL_DATA" in os.environ:
        places.append(Path(os.environ["VIT_REAL_DATA"], "kuberay-crds"))
    return next((place for place in places if place.is_dir()), None)


def download(folder: Path) -> None:
    """Copies the definitions of SOURCES to `folder`."""
    for name, (repository, tag, place) in SOURCES.items():
        with tempfile.TemporaryDirectory() as clone:
            command = [
                "git",
                "-c",
                "advice.detachedHead=false",
                "clone",
                "--quiet",
                "--depth=1",
                "--filter=blob:none",
                "--sparse",
                f"--branch={tag}",
            ]
            subprocess.run([*command, repository, clone], check=True)
            subprocess.run(["git", "-C", clone, "sparse-checkout", "set", place], check=True)
            shutil.copytree(Path(clone, place), folder / name, dirs_exist_ok=True)


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


if __name__ == "__main__":
    download(Path(sys.argv[1]))
