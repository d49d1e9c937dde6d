"""The model card of a registered version: the model, its training data, its scores and its licences.

The card is README.md in the files of the version, and its text is the version's description in MLflow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline import address, storage
from pipeline.errors import Unavailable, UserError, plural
from pipeline.revision_names import manifest_uri
from pipeline.tracking import names

NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """The content of a card. Dataset manifests that cannot be read are empty."""

    checkpoint: str
    commit: Mapping[str, Any]
    config: Mapping[str, Any]
    """config.json of the checkpoint."""
    data: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    run_id: str = ""


def collect_facts(checkpoint: str, commit: Mapping[str, Any], recipe: str = "", run_id: str = "") -> CardFacts:
    """Reads config.json of a checkpoint and the manifests of the data that it was trained and validated on. Raises
    Unavailable if a store is away: the card would say that these files cannot be read."""
    config = _read(storage.join(checkpoint, "config.json"))
    runtime = _runtime(config)
    manifests = {role: _manifest(str(runtime[role])) if runtime.get(role) else {} for role in ("data", "validation")}
    return CardFacts(checkpoint=checkpoint, commit=commit, config=config, recipe=recipe, run_id=run_id, **manifests)


def _manifest(text: str) -> dict[str, Any]:
    """The manifest of a dataset; of a mixture, what the card says of its data sets together. Empty when it cannot be
    read."""
    try:
        parts = address.shares(text)
    except UserError:
        return {}
    found = [_read(manifest_uri(uri)) for uri, _ in parts]
    if len(found) == 1 or not all(found):
        return found[0] if len(found) == 1 else {}
    configs = [_manifest_config(manifest) for manifest in found]
    licences = [str(config.get("licence") or NOT_STATED) for config in configs]
    sets = [config.get("decontaminate") or () for config in configs]
    return {
        "fingerprint": address.mixture_fingerprint([str(m.get("fingerprint")) for m in found], [s for _, s in parts]),
        "rows": sum(manifest.get("rows", 0) for manifest in found),
        "classes": list(dict.fromkeys(name for manifest in found for name in manifest.get("classes") or ())),
        "duplicates": sum(manifest.get("duplicates") or 0 for manifest in found),
        "history": [entry for manifest in found for entry in manifest.get("history") or ()],
        "config": {
            "source": [source for config in configs for source in config.get("source") or ()],
            "licence": "; ".join(dict.fromkeys(licences)),
            "decontaminate": [one for one in sets[0] if all(one in others for others in sets)],
        },
    }


def _read(uri: str) -> dict[str, Any]:
    try:
        values = storage.read_json(uri)
    except Unavailable:
        raise
    except (OSError, UserError):
        return {}
    return values if isinstance(values, dict) else {}


def _runtime(config: Mapping[str, Any]) -> Mapping[str, Any]:
    pretrain = config.get("pretrain")
    runtime = pretrain.get("runtime") if isinstance(pretrain, dict) else None
    return runtime if isinstance(runtime, dict) else {}


def _resize(config: Mapping[str, Any]) -> Any:
    """Shorter side to which validation resizes images, in pixels."""
    pretrain, size = config.get("pretrain"), config.get("model", {}).get("image_size")
    given = pretrain.get("validation_resize") if isinstance(pretrain, dict) else None
    return given or (round(size * 8 / 7) if isinstance(size, int) else "?")


def model_card(facts: CardFacts, evaluations: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """The card as Markdown. evaluations: {suite:suite version: {mean, spread, scores}}, accuracies in percent."""
    model, commit, runtime = facts.config.get("model", {}), facts.commit, _runtime(facts.config)
    step, images = commit.get("step"), commit.get("images_seen")
    seen = f", {plural(images, 'image')} seen" if images else ""
    lines = [
        f"**Model:** {model.get('variant', 'unknown')} at {model.get('image_size', '?')} px, "
        f"{plural(model.get('num_classes', '?'), 'class')}; step {step}{seen}"
        f"{f', recipe {facts.recipe}' if facts.recipe else ''}.",
        f"**Input:** RGB images, shorter side resized to {_resize(facts.config)} px, centre crop; the model normalises the "
        "pixels.",
        _data_line("Training data", runtime.get("data"), facts.data),
        _decontamination_line(facts.data),
        _validation_line(commit.get("metrics", {}), runtime.get("validation"), facts.validation),
        *_score_lines(evaluations or {}),
        f"**Licence of the weights:** {runtime.get('licence') or NOT_STATED}.",
        f"**Licence of the training data:** {_manifest_config(facts.data).get('licence') or NOT_STATED}.",
        f"**Classes:** {_classes(facts.config.get('classes') or [])}",
        f"**Checkpoint:** `{facts.checkpoint}`{f', MLflow run {facts.run_id}' if facts.run_id else ''}.",
    ]
    return "\n\n".join(line for line in lines if line)[: names.MAX_VALUE]


def plain_text(card: str) -> str:
    """A card without marks of Markdown: MLflow shows the description of a version as plain text in lists."""
    return card.replace("**", "").replace("`", "")


def _manifest_config(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    config = manifest.get("config")
    return config if isinstance(config, dict) else {}


def _data_line(title: str, uri: Any, manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return f"**{title}:** {uri or NOT_STATED}; its manifest cannot be read."
    added = [source for entry in manifest.get("history") or () for source in entry.get("source") or ()]
    found = dict.fromkeys([*(_manifest_config(manifest).get("source") or ()), *added])
    sources = ", ".join(map(str, found)) or NOT_STATED
    return (
        f"**{title}:** {uri}, fingerprint {manifest.get('fingerprint')}: {plural(manifest.get('rows', 0), 'image')} of "
        f"{plural(len(manifest.get('classes') or ()), 'class')}, made from {sources}."
    )


def _decontamination_line(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return "**Decontamination:** unknown."
    sets = _manifest_config(manifest).get("decontaminate") or ()
    duplicates = manifest.get("duplicates")
    removed = f" {plural(duplicates, 'image')} removed in all." if isinstance(duplicates, int) and duplicates else ""
    if not sets:
        return f"**Decontamination:** none; the training data may contain images of evaluation sets.{removed}"
    return f"**Decontamination:** without the images of {', '.join(map(str, sets))}.{removed}"


def _validation_line(metrics: Mapping[str, float], uri: Any, manifest: Mapping[str, Any]) -> str:
    if names.VAL_TOP1 not in metrics:
        return "**Validation:** none."
    rows = f" ({plural(manifest['rows'], 'image')})" if manifest.get("rows") else ""
    return f"**Validation:** top-1 {metrics[names.VAL_TOP1]:.2f}% on {uri}{rows}."


def _score_lines(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for key, summary in sorted(evaluations.items()):
        tasks = ", ".join(f"{task} {score:.2f}" for task, score in (summary.get("scores") or {}).items())
        lines.append(
            f"**Transfer, {key.partition(':')[0]}:** mean {summary['mean']:.2f}% ± {summary['spread']:.2f} "
            f"(standard error){f': {tasks}' if tasks else ''}."
        )
    return lines or ["**Transfer:** not evaluated yet."]


def _classes(classes: list[Any]) -> str:
    shown = ", ".join(map(str, classes[:50]))
    return f"{shown}, ... ({len(classes)} in all)" if len(classes) > 50 else shown or NOT_STATED
