"""States of instances with reasons, selection of instances, and their command lines."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import config as configuration
from pipeline import storage
from pipeline.address import data_address
from pipeline.errors import StorageError, UserError, nearest
from pipeline.graph import fields, fingerprints, kinds
from pipeline.graph.file import Pipeline
from pipeline.graph.fingerprints import Content, Fingerprints, NotFound
from pipeline.graph.instances import Address, Instance, defaults
from pipeline.graph.references import data_of, fill
from pipeline.graph.state import StageVersion, State

DONE, RUNNING, FAILED, STOPPED, STALE, WAITING = "done", "running", "failed", "stopped", "stale", "waiting"


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The identity of an instance whose inputs exist."""

    id: str
    about: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """The state of an instance, with the reason."""

    state: str
    why: str = ""
    version: StageVersion | None = None


class Plan:
    """The instances of a pipeline and their recorded state. Read-only."""

    def __init__(self, pipeline: Pipeline, instances: Mapping[str, Instance], state: State, where: str = "pipeline"):
        self.pipeline, self.instances, self.state, self.where = pipeline, instances, state, where
        self.external = Fingerprints(state.sources, pipeline.tracking_uri)
        self.forced: set[str] = set()
        """Instances that run again although they are done (--force)."""
        self._folders: dict[str, str] = {}
        self._trees: dict[str, str] = {}
        self._complete: dict[str, bool] = {}
        self._versions: dict[str, list[StageVersion]] | None = None
        self.done: dict[str, StageVersion] = {}
        """{instance: version} of the instances found done so far."""
        self.outputs: dict[str, str] = {}
        """{instance: URI of its output} of the instances in `done`."""

    # ------------------------------------------------------------ inputs

    def check_inputs(self) -> None:
        """Raises UserError for a missing input outside the pipeline."""
        for instance in self.instances.values():
            for field, addresses in {**instance.reads, **instance.observes}.items():
                for address in addresses:
                    if address.instance is None and not address.covers:
                        self._outside(instance, field, address)

    def _outside(self, instance: Instance, field: str, address: Address) -> str:
        try:
            return self.external.fingerprint(address.text)
        except NotFound as error:
            default = "" if field in instance.given else f" (the default of {field}; give the field)"
            raise UserError(f"{self.where}: stage {instance.stage}: {field}: {error}{default}") from error

    # ------------------------------------------------------------ identities

    def identity(self, instance: Instance) -> Identity:
        """The identity of an instance whose dependencies are all in `done`."""
        inputs: dict[str, str] = {}
        for field, addresses in instance.reads.items():
            for i, address in enumerate(addresses):
                key = field if len(addresses) == 1 else f"{field}.{i}"
                if address.covers:
                    inputs[key] = configuration.fingerprint([self.done[up].fingerprint for up in address.covers])
                elif address.instance is None:
                    inputs[key] = self._outside(instance, field, address)
                else:
                    inputs[key] = self.done[address.instance].content.below(address.below)
        if len(instance.reads.get("scores", ())) > 1:  # the order of scores does not affect a promotion
            inputs = {"scores": configuration.fingerprint(sorted(inputs.values()))}
        inputs |= {f"after {name}": self.done[name].fingerprint for name in instance.after}
        about = {
            "job": instance.kind.name,
            "config": instance.decides,
            "inputs": inputs,
            "formats": kinds.versions(instance.kind.formats),
        }
        return Identity(id=configuration.fingerprint(about), about=about)

    def tree(self, name: str) -> str:
        """A fingerprint that is known before any run: of the config of an instance and of all its dependencies."""
        if name not in self._trees:
            instance = self.instances[name]
            inputs = {
                field: [self._known_before(instance, field, address) for address in addresses]
                for field, addresses in instance.reads.items()
            }
            config = {key: value for key, value in instance.decides.items() if key not in instance.kind.joins}
            about = [instance.kind.name, config, inputs, [self.tree(up) for up in instance.after]]
            self._trees[name] = configuration.fingerprint([about, kinds.versions(instance.kind.formats)])
        return self._trees[name]

    def _known_before(self, instance: Instance, field: str, address: Address) -> Any:
        if address.covers:
            return [self.tree(up) for up in address.covers]
        if address.instance is not None:
            return [self.tree(address.instance), address.below]
        return self._outside(instance, field, address)

    def folder(self, name: str) -> str:
        """The URI of the output of an instance: from the file, or a folder for this version."""
        if name not in self._folders:
            instance = self.instances[name]
            own = "-".join(filter(None, [instance.label, self.tree(name)[:8]]))
            self._folders[name] = instance.output or storage.join(self.state.root, instance.stage, own)
        return self._folders[name]

    # ------------------------------------------------------------ states

    def find(self, name: str, identity: Identity) -> StageVersion | None:
        """A finished run of any stage with this identity whose output still exists."""
        if self._versions is None:
            self._versions = {}
            for record in self.state.records.values():
                for version in record.versions:
                    self._versions.setdefault(_key(version.about), []).append(version)
        instance = self.instances[name]
        same = self._versions.get(_key(identity.about), [])
        for version in reversed(same):
            output = self.state.address(version.output)
            if instance.output is not None and instance.output != output:
                moved = dataclasses.replace(version, output=self.state.relative(instance.output))
                if self.is_complete(moved) and _content(instance.output).fingerprint == version.fingerprint:
                    return moved
            elif self.is_complete(version):
                return version
        return None

    def is_complete(self, version: StageVersion) -> bool:
        """Whether the output of a finished run still exists."""
        place = self._marker(version)
        if place not in self._complete:
            self._complete[place] = not version.marker or storage.exists(place)
        return self._complete[place]

    def _marker(self, version: StageVersion) -> str:
        return storage.join(self.state.address(version.output), version.marker)

    def add(self, name: str, version: StageVersion) -> None:
        """Records a finished run of an instance and counts the instance as done."""
        self.state.record(name).add(version)
        if self._versions is not None:
            self._versions.setdefault(_key(version.about), []).append(version)
        self._complete.pop(self._marker(version), None)
        self.mark_done(name, version)

    def mark_done(self, name: str, version: StageVersion) -> None:
        """Marks an instance as done, with the output of that version."""
        self.done[name] = version
        self.outputs[name] = self.state.address(version.output)

    def forget(self) -> None:
        """Clears the caches of storage and state."""
        self._versions = None
        self._complete.clear()

    def survey(self) -> dict[str, Status]:
        """{instance: state}, in the order of the pipeline."""
        self.forget()
        self.done.clear()
        self.outputs.clear()
        found: dict[str, Status] = {}
        for name, instance in self.instances.items():
            found[name] = self._status(name, instance)
            version = found[name].version
            if found[name].state == DONE and version is not None:
                self.mark_done(name, version)
        return found

    def _status(self, name: str, instance: Instance) -> Status:
        record = self.state.records.get(name)
        if record is not None and record.running is not None:
            return Status(state=RUNNING)
        before = record.versions[-1] if record is not None and record.versions else None
        lacking = [up for up in instance.needs if up not in self.done]
        failed = record.failed if record is not None else None
        if lacking:
            if failed is not None and not before:
                return Status(state=STOPPED if failed.stopped else FAILED, why=failed.reason)
            after = lacking[0] + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            return Status(state=STALE if before else WAITING, why=f"after {after}")
        identity = self.identity(instance)
        if (version := self.find(name, identity)) is not None:
            return Status(state=DONE, version=version)
        if failed is not None and failed.identity == identity.id:
            return Status(state=STOPPED if failed.stopped else FAILED, why=failed.reason)
        if before is not None:
            return Status(state=STALE, why=why_stale(before, identity))
        return Status(state=WAITING, why="ready")

    # ------------------------------------------------------------ selection

    def select(self, only: Sequence[str] = (), first: Sequence[str] = (), last: Sequence[str] = ()) -> list[str]:
        """Names of the instances to run, in order. only: these. first: these and all that depend on them. last: these
        and all their dependencies. Raises UserError for an unknown name."""
        chosen = set(self.instances)
        if only:
            chosen &= set(self.named(only, "--only"))
        if first:
            reached = set(self.named(first, "--from"))
            for name, instance in self.instances.items():
                if reached & set(instance.needs):
                    reached.add(name)
            chosen &= reached
        if last:
            reached = set(self.named(last, "--until"))
            for name in reversed(list(self.instances)):
                if name in reached:
                    reached |= set(self.instances[name].needs)
            chosen &= reached
        return [name for name in self.instances if name in chosen]

    def named(self, names: Iterable[str], flag: str) -> list[str]:
        """The instances with these names of stages or instances. Raises UserError for an unknown name."""
        found = []
        for name in names:
            mine = [one for one, instance in self.instances.items() if name in (one, instance.stage)]
            if not mine:
                options = {one.stage for one in self.instances.values()} | set(self.instances)
                raise UserError(f'{flag}: no stage "{name}"{nearest(name, options)}')
            found += mine
        return found

    # ------------------------------------------------------------ command lines

    def command(self, name: str, outputs: Mapping[str, str] | None = None, output: str | None = None) -> list[str]:
        """The command line of an instance, starting with the script, without flags that repeat a default. outputs: URIs
        of its dependencies."""
        instance = self.instances[name]
        outputs = self.outputs if outputs is None else outputs
        kind, cls = instance.kind, kinds.config_class(instance.kind)
        values: dict[str, Any] = {}
        for key in instance.given:
            value = fill(fields.get(instance.config, key), outputs)
            if (kind.name, key) == ("pretrain", "data"):
                value = data_address([(fill(uri, outputs), share) for uri, share in data_of(instance.config)])
            elif key in kind.reads or key in kind.observes:
                many = isinstance(value, list | tuple)
                value = tuple(_absolute(v) for v in value) if many else value and _absolute(value)
            values[key] = value
        known = fields.paths(cls)
        if kind.name == "pretrain":
            values.setdefault("register", None)  # `promote` registers checkpoints
        if "tracking_uri" in known and "tracking_uri" not in values and self.pipeline.tracking_uri:
            values["tracking_uri"] = self.pipeline.tracking_uri
        if "output" in known:
            values["output"] = output or self.folder(name)
        first = values.pop(kind.positional, ()) if kind.positional else ()
        start = kinds.start(kind, instance.recipe, instance.given, name)
        values = {key: value for key, value in values.items() if key == "output" or value != fields.get(start, key)}
        recipe = [f"--{kind.recipe_flag}", instance.recipe] if instance.recipe else []
        return [kind.script, *kind.words, *map(str, first), *recipe, *fields.flags(values), *kind.extra]


def _key(about: Mapping[str, Any]) -> str:
    """A fingerprint of an identity. Options that did not exist at the time of the run count with their defaults."""
    kind = kinds.KINDS.get(about["job"])
    config = {**(defaults(kind) if kind is not None else {}), **about["config"]}
    return configuration.fingerprint([about["job"], config, about["inputs"], about["formats"]])


def why_stale(before: StageVersion, now: Identity) -> str:
    """A short description of the differences to the last finished run."""
    if before.identity == now.id:
        return f"the output {before.output} no longer exists"
    reasons = []
    old, new = before.about, now.about
    for key, value in new["config"].items():
        if key not in old["config"] or old["config"][key] != value:
            reasons.append(f"{key}: {_brief(old['config'].get(key))} -> {_brief(value)}")
    reasons += [f"{key} is new" for key in new["inputs"] if key not in old["inputs"]]
    reasons += [f"{key} has changed" for key, value in new["inputs"].items() if old["inputs"].get(key, value) != value]
    reasons += [f"{key} was removed" for key in old["inputs"] if key not in new["inputs"]]
    reasons += [
        f"format of {key}: {old['formats'].get(key)} -> {value}"
        for key, value in new["formats"].items()
        if old["formats"].get(key) != value
    ]
    return "; ".join(reasons) or "another job"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."


def _content(uri: str) -> Content:
    try:
        return fingerprints.content_of(uri) or Content("")
    except StorageError:
        raise
    except UserError:
        return Content("")


def _absolute(text: str) -> str:
    if fingerprints.NOT_A_PATH.match(text) or text.startswith(("models:/", "runs:/")):
        return text
    return storage.normalise(text)
