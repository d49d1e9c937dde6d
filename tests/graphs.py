"""A small pipeline, and an executor that simulates its jobs without processes."""

from pipeline import storage
from pipeline.commit import write_commit
from pipeline.graph import file, instances, state
from pipeline.graph.executor import Ended
from pipeline.graph.file import Pipeline, Stage
from pipeline.graph.plan import Plan
from pipeline.graph.runner import Runner


def chain(root, source, **more):
    """prepare -> pretrain -> two transfers."""
    data = {"source": str(source), "size": 32, **more.get("data", {})}
    pretrain = {"data": "${data.output}", "validation": None, **more.get("pretrain", {})}
    transfer = {"checkpoint": "${pretrain.output}", "data": "${data.output}", **more.get("transfer", {})}
    stages = {
        "data": Stage(job="prepare", fields=data),
        "pretrain": Stage(job="pretrain", recipe="demo", fields=pretrain),
        "transfer": Stage(job="transfer", recipe="demo", fields=transfer, matrix={"tasks": ["linear", "knn"]}),
    }
    return file.check_pipeline(Pipeline(name="chain", output=str(root), stages=stages, retries=1), "test")


class Fake:
    """Executor whose attempts end at the next poll, as `plot` defines: {job's stage: [codes]}."""

    pause, cpus, gpus = 0.0, 4.0, 0.0

    def __init__(self, plot=None):
        self.plot, self.started, self.running, self.most = plot or {}, [], {}, 0

    def start(self, attempt):
        stage = attempt.title.partition("/")[2]
        self.started.append(stage)
        self.running[attempt.job] = (stage, attempt.words)
        self.most = max(self.most, len(self.running))

    def look(self, job, log):
        stage, words = self.running.pop(job)
        code = self.plot.get(stage, [0]).pop(0) if self.plot.get(stage) else 0
        if code == 0:
            self._make(words[0], words[words.index("--output") + 1], words)
        return Ended(code=code, reason="told to", seconds=1.0)

    def _make(self, script, output, words):
        if script == "jobs/prepare.py":
            content = "-".join(words[words.index("--size") + 1 :][:1])
            storage.write_bytes(f"{output}/manifest.json", f'{{"fingerprint": "data-{content}"}}'.encode())
        elif script == "jobs/pretrain.py":
            files = {"model.safetensors": {"sha256": output, "size": 1}}
            write_commit(f"{output}/checkpoints/step-00000001", {"step": 1, "files": files})
            storage.write_bytes(f"{output}/checkpoints/step-00000001/model.safetensors", b"x")
        else:
            scores = {"linear": {"mean": 90.0, "values": [90.0]}}
            storage.write_json(f"{output}/scores.json", {"scores": scores, "gpus": 2.0})

    def stop(self, job):
        pass

    def forget(self, job):
        pass


def plan_of(pipeline):
    plan = Plan(pipeline, instances.expand(pipeline), state.load(pipeline.root))
    plan.check_inputs()
    return plan


def go(pipeline, executor=None, **options):
    plan = plan_of(pipeline)
    selected = plan.select(**options)
    outcome = Runner(plan, selected, executor or Fake()).run()
    plan.state.save()
    return outcome


def states(pipeline):
    return {name: (status.state, status.why) for name, status in plan_of(pipeline).survey().items()}
