"""Runs unfinished instances, independent ones in parallel. A restarted runner continues.

Only the runner writes state.json, while it holds a lease on the pipeline. It records every attempt, with a unique name,
before it starts, so that a restarted runner finds it."""

import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from pipeline import storage
from pipeline.errors import TRY_LATER, Unavailable, UserError
from pipeline.graph import cost, fingerprints, report, results
from pipeline.graph.executor import Attempt, Ended, Executor
from pipeline.graph.instances import Instance
from pipeline.graph.plan import DONE, Identity, Plan
from pipeline.graph.state import FOLDER, FailedAttempt, Running, StageVersion

logger = logging.getLogger(__name__)

LOST_AT_MOST = 5
"""Maximum number of attempts lost to dead nodes or signals before a stage counts as failed."""
WRONG_INPUT = 2
STOP_CODES = (130, 143)
LATER_AT_MOST = 30
LATER_PAUSE = 20.0
"""Number of retries, and pause in seconds, of a stage that ends with `TRY_LATER`: its store does not answer, or an
earlier attempt on a node that has lost its head still works in its output."""
REPORT_EVERY = 30.0
"""Seconds between two lines about the progress of the running stages."""
STOP_GRACE = 90.0
"""Seconds for stages to save their state when the runner is stopped."""


@dataclass(kw_only=True, slots=True)
class PipelineOutcome:
    """Results of a run of the pipeline."""

    done: list[str] = field(default_factory=list)
    """Finished in this run."""
    kept: list[str] = field(default_factory=list)
    """Done before."""
    failed: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    """Not started, because a dependency is not done."""
    seconds: float = 0.0


class Runner:
    """A run of the selected instances. watch: called after every change with the running instances."""

    def __init__(
        self,
        plan: Plan,
        selected: Sequence[str],
        executor: Executor,
        *,
        parallel: int | None = None,
        watch: Callable[[Plan, Collection[str]], None] = lambda plan, running: None,
    ) -> None:
        self.plan, self.selected, self.executor, self.watch = plan, list(selected), executor, watch
        self.parallel = parallel or plan.pipeline.parallel
        self.outcome = PipelineOutcome()
        self.running: dict[str, Running] = {}
        self._tries: dict[str, int] = {}
        self._lost: dict[str, int] = {}
        self._later: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._outdated: set[str] = set()
        self._ready: dict[str, Identity] = {}
        """Instances whose dependencies are done and which no finished run matches."""
        self._made: set[str] = set()
        """Identities of the runs that finished since the last look at `_ready`."""
        self._stopping = False
        self._dirty = False
        self._next_report = time.monotonic() + REPORT_EVERY

    def run(self) -> PipelineOutcome:
        """Runs until nothing is running and nothing more can be started."""
        began = time.monotonic()
        self._adopt()
        left = [name for name in self.plan.instances if name in self.selected]
        try:
            while True:
                left = self._start_what_is_ready(left)
                self._save()
                if not self.running and not any(name in self._not_before for name in left):
                    break
                left += self._wait()
        except BaseException:
            self._stop_all()
            raise
        finally:
            self.outcome.blocked = [name for name in left if name not in self.outcome.failed]
            self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def _wait(self) -> list[str]:
        """Waits until an attempt has ended, or until a postponed one is due. Returns what is to be started again."""
        while True:
            time.sleep(self.executor.pause)
            self._report()
            before = len(self.running)
            again = [name for running in list(self.running) for name in self._look(running)]
            if len(self.running) < before or any(time.monotonic() >= due for due in self._not_before.values()):
                return again

    def _report(self) -> None:
        """Logs the progress of the running stages, from time to time."""
        if time.monotonic() < self._next_report:
            return
        self._next_report = time.monotonic() + REPORT_EVERY
        for name, running in self.running.items():
            logger.info("%s: running, %s", name, report.describe_progress(self.plan.state.root, running))

    # ------------------------------------------------------------ attempts of earlier runners

    def _adopt(self) -> None:
        """Takes over unfinished attempts of an earlier runner."""
        for name, record in self.plan.state.records.items():
            if record.running is None:
                continue
            if name not in self.plan.instances:  # its stage is no longer in the file
                self.executor.stop(record.running.job)
                record.running = None
                continue
            self.running[name] = record.running
            instance = self.plan.instances[name]
            is_current = self._settle_needs(instance, adopting=True)
            if is_current and self.plan.identity(instance).id == record.running.identity:
                self._tries[name] = record.running.attempt
                logger.info("%s: still running from an earlier run (%s)", name, record.running.job)
            else:  # the file or a dependency has changed
                logger.warning("%s: stopping the running attempt, whose settings or inputs are out of date", name)
                self._outdated.add(name)
                self.executor.stop(record.running.job)

    # ------------------------------------------------------------ starting

    def _start_what_is_ready(self, left: list[str]) -> list[str]:
        """Starts instances whose dependencies are done, as resources allow. Returns the others."""
        still = []
        for name in left:
            if name in self.running or name in self.outcome.failed:
                continue
            instance = self.plan.instances[name]
            identity = self._ready.get(name)
            if identity is None or identity.id in self._made:
                if not self._settle_needs(instance):
                    still.append(name)
                    continue
                identity = self.plan.identity(instance)
                if name not in self.plan.forced and (version := self.plan.find(name, identity)) is not None:
                    self._keep(name, version)
                    continue
                self._ready[name] = identity
            if self._is_too_early(name) or not self._has_room(instance) or self._is_made_elsewhere(identity):
                still.append(name)
                continue
            del self._ready[name]
            try:
                self._start(name, instance, identity)
            except UserError as error:
                if self._refuse(name, identity, error):
                    still.append(name)
        self._made.clear()
        return still

    def _keep(self, name: str, version: StageVersion) -> None:
        """Counts an instance as done by an earlier run, or by another instance with the same identity."""
        self._ready.pop(name, None)
        self.plan.mark_done(name, version)
        self.outcome.kept.append(name)
        record = self.plan.state.records.get(name)
        if record is not None and record.failed is not None:
            record.failed = None
            self._dirty = True

    def _is_too_early(self, name: str) -> bool:
        """Whether an instance waits for its next attempt."""
        if time.monotonic() < self._not_before.get(name, 0.0):
            return True
        self._not_before.pop(name, None)
        return False

    def _settle_needs(self, instance: Instance, adopting: bool = False) -> bool:
        """Whether all dependencies of an instance are done, including those that are not selected.

        adopting: selected dependencies, which this run has not visited yet, count if an earlier run has finished them.
        """
        for up in instance.needs:
            if up in self.plan.done:
                continue
            is_pending = up in self.plan.forced if adopting else up in self.selected
            if is_pending or up in self.running:
                return False
            needed = self.plan.instances[up]
            if not self._settle_needs(needed, adopting):
                return False
            version = self.plan.find(up, self.plan.identity(needed))
            if version is None:
                return False
            self.plan.mark_done(up, version)
        return True

    def _has_room(self, instance: Instance) -> bool:
        """Whether the executor has CPUs and GPUs for one more instance; a single instance always runs."""
        if self._stopping or len(self.running) >= self.parallel:
            return False
        if not self.running:
            return True
        cpus, gpus = self._occupies(instance)
        for name in self.running:
            more_cpus, more_gpus = self._occupies(self.plan.instances[name])
            cpus, gpus = cpus + more_cpus, gpus + more_gpus
        return cpus <= self.executor.cpus and gpus <= self.executor.gpus

    def _occupies(self, instance: Instance) -> tuple[float, float]:
        """(CPUs, GPUs) of a running instance; without a number of CPUs, all of the machine."""
        cpus = self.executor.cpus if instance.cpus is None else instance.cpus
        return cpus, cost.gpus(instance, self.executor.gpus)

    def _is_made_elsewhere(self, identity: Identity) -> bool:
        return any(running.identity == identity.id for running in self.running.values())

    def _start(self, name: str, instance: Instance, identity: Identity) -> None:
        record = self.plan.state.record(name)
        output = self.plan.folder(name)
        if name in self.plan.forced and name not in self._tries:
            storage.remove(output, recursive=True)
            record.versions = [version for version in record.versions if version.identity != identity.id]
            self.plan.forget()
        else:
            self._check_free(name, output, identity)
        before = record.failed.spent if record.failed is not None and record.failed.identity == identity.id else {}
        spent = record.running.spent if record.running is not None else before
        self._tries[name] = self._tries.get(name, 0) + 1
        job = job_name(self.plan.pipeline.name, name, identity.id, self._tries[name])
        log = storage.join(self.plan.state.root, FOLDER, "logs", f"{job}.log")
        record.failed = None
        record.running = Running(
            identity=identity.id,
            about=identity.about,
            output=self.plan.state.relative(output),
            job=job,
            attempt=self._tries[name],
            started=time.time(),
            spent=spent,
            log=self.plan.state.relative(log),
        )
        self.plan.state.save()  # before the start, so that every running attempt is recorded
        self.executor.start(
            Attempt(
                job=job,
                title=f"{self.plan.pipeline.name}/{name}",
                words=self.plan.command(name, output=output),
                environment=self._environment(name, job),
                log=log,
                memory=instance.memory,
            )
        )
        self.running[name] = record.running
        logger.info("%s: started%s", name, f" (attempt {self._tries[name]})" if self._tries[name] > 1 else "")
        self.watch(self.plan, self.running)

    def _refuse(self, name: str, identity: Identity, error: UserError) -> bool:
        """Records an instance that could not be started. Returns whether to try again, as after an attempt that ended
        with the error's exit code."""
        record = self.plan.state.record(name)
        spent = record.running.spent if record.running is not None else {}
        record.running = None
        code = getattr(error, "exit_code", WRONG_INPUT)
        record.failed = FailedAttempt(identity=identity.id, reason=str(error), code=code, at=time.time(), spent=spent)
        self._dirty = True
        if self._may_try_again(name, Ended(code=code)):
            logger.warning("%s: not started: %s; trying again", name, error)
            return True
        self.outcome.failed.append(name)
        logger.error("%s: %s", name, error)
        return False

    def _environment(self, name: str, job: str) -> dict[str, str]:
        return {
            "VIT_PIPELINE": self.plan.pipeline.name,
            "VIT_PIPELINE_STAGE": name,
            "VIT_PIPELINE_RUN": str(self.plan.state.run.get("id", "")),
            "VIT_PROGRESS": results.progress_place(self.plan.state.root, job),
        }

    def _check_free(self, name: str, output: str, identity: Identity) -> None:
        """Raises UserError if the `output` field names a folder with an output of other settings."""
        if self.plan.instances[name].output is None:
            return
        for version in (v for record in self.plan.state.records.values() for v in record.versions):
            is_here = self.plan.state.address(version.output) == output and self.plan.is_complete(version)
            if is_here and version.identity != identity.id:
                raise UserError(
                    f"stage {name}: {output} has the output of other settings; replace it with `--force {name}`, or remove "
                    "`output` from the stage, so that each version has a separate folder"
                )

    # ------------------------------------------------------------ ending

    def _look(self, name: str) -> list[str]:
        """Checks an attempt and handles its end. Returns [name] if the instance is to be started again."""
        running = self.running[name]
        ended = self.executor.look(running.job, self.plan.state.address(running.log))
        if ended is None:
            return []
        del self.running[name]
        record = self.plan.state.record(name)
        spent = cost.add(running.spent, cost.of_attempt(self.plan.instances[name], self.executor, running, ended))
        again: list[str] = []
        if name in self._outdated:
            self._outdated.discard(name)
            record.running = None
            again = [name] if name in self.selected else []
        elif ended.code == 0:
            try:
                self._finish(name, running, spent)
            except Unavailable as error:  # a further attempt finds the finished output
                again = self._end(name, running, Ended(code=TRY_LATER, reason=str(error)), spent)
        else:
            again = self._end(name, running, ended, spent)
        self.executor.forget(running.job)
        with contextlib.suppress(UserError, OSError):
            storage.remove(results.progress_place(self.plan.state.root, running.job))
        self._dirty = True
        self.watch(self.plan, self.running)
        return again

    def _end(self, name: str, running: Running, ended: Ended, spent: dict[str, float]) -> list[str]:
        """Handles an attempt that was not successful. Returns [name] if the instance is to be started again."""
        reason = ended.reason or f"exit code {ended.code}"
        if self._stopping or ended.code in STOP_CODES:
            self._fail(name, running, ended, spent, "stopped; the same command continues", stopped=True)
        elif self._may_try_again(name, ended):
            logger.warning("%s: %s; trying again", name, reason)
            record = self.plan.state.record(name)
            record.running = None
            record.failed = FailedAttempt(identity=running.identity, reason=ended.reason, code=ended.code, spent=spent)
            return [name]
        else:
            self._fail(name, running, ended, spent, reason)
        return []

    def _may_try_again(self, name: str, ended: Ended) -> bool:
        if ended.code == TRY_LATER:
            self._later[name] = self._later.get(name, 0) + 1
            if self._later[name] > LATER_AT_MOST:
                return False
            self._not_before[name] = time.monotonic() + LATER_PAUSE
            return True
        if ended.code is None:
            self._lost[name] = self._lost.get(name, 0) + 1
            return self._lost[name] <= LOST_AT_MOST
        failures = self._tries.get(name, 1) - self._lost.get(name, 0) - self._later.get(name, 0)
        return ended.code != WRONG_INPUT and failures <= self.plan.instances[name].retries

    def _finish(self, name: str, running: Running, spent: dict[str, float]) -> None:
        """Records a finished run. A run without output has failed. Raises Unavailable if the store is away."""
        instance = self.plan.instances[name]
        output = self.plan.state.address(running.output)
        try:
            marker = fingerprints.complete(output, instance.kind.marker) if instance.kind.marker else ""
            if marker is None:
                raise UserError(f"ended with exit code 0, but {output} has no complete output")
            content = fingerprints.content_of(output) or fingerprints.Content(
                fingerprints.Fingerprints().fingerprint(output)
            )
        except Unavailable:
            raise
        except UserError as error:
            self._fail(name, running, Ended(code=1), spent, str(error))
            return
        result = results.read(instance.kind.name, output)
        version = StageVersion(
            identity=running.identity,
            about=running.about,
            output=running.output,
            marker=marker,
            fingerprint=content.fingerprint,
            parts=content.parts,
            cost=cost.finished(self.plan, instance, running, spent, output),
            finished=time.time(),
            result=result,
        )
        self.plan.add(name, version)
        self.plan.forced.discard(name)
        self._made.add(version.identity)
        self.outcome.done.append(name)
        logger.info("%s: done in %.1f s", name, version.cost["seconds"])

    def _fail(
        self, name: str, running: Running, ended: Ended, spent: dict[str, float], reason: str, stopped: bool = False
    ) -> None:
        record = self.plan.state.record(name)
        record.running = None
        record.failed = FailedAttempt(
            identity=running.identity,
            reason=reason,
            code=ended.code,
            stopped=stopped,
            attempts=self._tries.get(name, 1),
            at=time.time(),
            log=running.log,
            spent=spent,
        )
        self.outcome.failed.append(name)
        logger.error("%s: %s: %s (log: %s)", name, "stopped" if stopped else "failed", reason, running.log)

    def _stop_all(self) -> None:
        """Stops the stages, waits until they have saved their state, and records the result."""
        self._stopping = True
        if self.running:
            logger.info("stopping %s; running stages save their state first", ", ".join(self.running))
        for running in self.running.values():
            self.executor.stop(running.job)
        until = time.monotonic() + STOP_GRACE
        while self.running and time.monotonic() < until:
            try:
                for name in list(self.running):
                    self._look(name)
            except Unavailable:  # the stages continue without this runner; the next one finds them
                break
            self._save()
            time.sleep(self.executor.pause)
        self._dirty = True
        self._save()

    def _save(self) -> None:
        if self._dirty:
            self.plan.state.save()
            self._dirty = False


def job_name(pipeline: str, instance: str, identity: str, attempt: int) -> str:
    """A unique name for an attempt, in characters that are valid in Ray, file systems and object stores."""
    readable = re.sub(r"[^A-Za-z0-9_.=,-]+", "-", f"{pipeline}-{instance}").strip("-")[:80].rstrip("-")
    return f"{readable}-{identity[:6]}-{uuid.uuid4().hex[:4]}-{attempt}"


def is_finished(plan: Plan, selected: Collection[str]) -> bool:
    """Whether all selected instances are done and nothing is running."""
    return all(status.state == DONE for name, status in plan.survey().items() if name in selected)


def about_run(plan: Plan) -> bool:
    """Gives the run of the pipeline an id. Returns whether it continues a run that an earlier runner did not finish."""
    if plan.state.run.get("id"):
        return True
    plan.state.run = {"id": uuid.uuid4().hex[:12], "started": time.time()}
    return False
