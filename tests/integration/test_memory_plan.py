"""Compares the memory estimates of jobs/plan.py with the allocations of a real run of the engine."""

import subprocess
import sys

import pytest

from tests.ports import free_port

RUN = """
import os, sys, time
port, stage, precision, batch = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], 16
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
import torch
from torch.profiler import ProfilerActivity, profile

from models import create_model
from models.losses import training_loss
from pipeline.training.memory import BUCKET_ELEMENTS
from pipeline.training.memory import activations
from pipeline.training.memory import model_states
from pipeline.training import engine as module
from pipeline.training.engine import Engine
from pipeline.training.config import EngineConfig, OptimizerConfig

settings = module.deepspeed_config
def as_on_a_gpu(*arguments):
    result = settings(*arguments)
    result["zero_optimization"]["contiguous_gradients"] = True  # which is what is planned
    return result
module.deepspeed_config = as_on_a_gpu
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", rank=0, world_size=1)
options = {"variant": "S/16", "num_classes": 1000, "image_size": 96}
dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
    model = create_model(**options)
    count = sum(parameter.numel() for parameter in model.parameters())
    config = EngineConfig(zero=stage, precision=precision)
    engine = Engine(model, OptimizerConfig(), config, accumulation=1, micro_batch=batch, device=torch.device("cpu"))
    for _ in range(2):
        images, labels = torch.randn(batch, 3, 96, 96, dtype=dtype), torch.zeros(batch, dtype=torch.long)
        engine.train_step([lambda model: training_loss(model(images), {"label": labels}, "softmax")], 1e-3)
events = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
used = peak = 0
for _, size in sorted(events):
    used += size
    peak = max(peak, used)
each, largest = activations(options, engine=EngineConfig(precision=precision))
buffers = BUCKET_ELEMENTS * dtype.itemsize
planned = model_states(count, stage, 1, precision=precision) + buffers + batch * (each + 3 * largest)
print(planned, peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_a_real_run_uses_the_planned_memory(stage, precision):
    """The peak of torch's allocations in two steps of S/16 is within 10% of the plan."""
    command = [sys.executable, "-c", RUN, str(free_port()), str(stage), precision]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    planned, peak = map(int, done.stdout.splitlines()[-1].split())
    assert planned == pytest.approx(peak, rel=0.1)
