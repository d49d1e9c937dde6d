"""Private interfaces of Ray, DeepSpeed and MLflow that this project uses, and the versions that it was written for.

If a test fails after an upgrade: check what has changed in these interfaces, run the slow tests of tests/integration,
and then change the version in the file that the test names."""

import dataclasses
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import ray_state
from pipeline.tracking import mlflow_private, search, server
from pipeline.training import zero_layout


def test_ray_is_the_version_that_ray_state_and_ray_compat_were_written_against():
    assert version("ray") == ray_state.WRITTEN_FOR, "see pipeline/ray_state.py and pipeline/training/ray_compat.py"


def test_deepspeed_is_the_version_that_zero_layout_was_written_against():
    assert version("deepspeed") == zero_layout.WRITTEN_FOR, "see pipeline/training/zero_layout.py"


def test_mlflow_is_the_version_that_mlflow_private_was_written_against():
    assert version("mlflow") == mlflow_private.WRITTEN_FOR, "see pipeline/tracking/mlflow_private.py"


def test_mlflows_server_knows_the_settings_that_make_ui_sets():
    constants = importlib.import_module("mlflow.server.constants")
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(mlflow_private.server_settings("sqlite:///x.db")) <= known


def test_mlflows_ui_has_the_keys_of_the_browser_that_make_ui_sets():
    folder = Path(importlib.import_module("mlflow.server").__file__).parent / "js" / "build" / "static" / "js"
    pages = [file.read_text(errors="replace") for file in folder.glob("main.*.js")]
    # the page appends the version to the key at run time
    for key in (mlflow_private.WORKFLOW, mlflow_private.ASSISTANT):
        assert any(key.removesuffix("_v1") in page for page in pages), key


def test_mlflows_tables_agree_with_its_search(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow, experiment = server.client(uri), server.experiment_id(f"sqlite:///{tmp_path}/mlflow.db", "transfer")
    made = [mlflow.create_run(experiment, run_name=name).info.run_id for name in ("a", "b", "child", "deleted")]
    for step, run in enumerate(made):
        mlflow.log_metric(run, "score/own", 10.0, step=0)
        mlflow.log_metric(run, "score/own", 20.0 + step, step=1)
        mlflow.set_tag(run, "checkpoint", f"runs/{step}")
    mlflow.log_metric(made[0], "loss", float("nan"))
    for run in (made[0], made[1], made[3]):
        mlflow.log_param(run, "suite", "demo")
    mlflow.set_terminated(made[0])
    mlflow.delete_run(made[3])

    def plain(runs):
        return {run.id: repr(dataclasses.asdict(run)) for run in runs}

    assert plain(search.read_runs("transfer", uri=uri)) == plain(search.search_runs("transfer", uri=uri))
    assert {run.id for run in search.read_runs("transfer", with_param="suite", uri=uri)} == set(made[:2])


def test_ray_train_has_the_names_that_are_replaced():
    from pipeline.training import ray_compat

    for name in ray_compat.__all__:
        assert hasattr(ray_compat, name)
    trainer = ray_compat.PolicyTrainer.__mro__[1]
    assert "_initialize_and_run_controller" in vars(trainer) or hasattr(trainer, "_initialize_and_run_controller")
    assert hasattr(ray_compat.ElasticScalingPolicy, "_count_possible_workers")
    policy = ray_compat.DefaultFailurePolicy(ray_compat.FailureConfig(max_failures=1))
    assert ray_compat.count_failures(policy) == 0


def test_ray_train_ranks_the_workers_of_a_node_consecutively():
    """docs/clusters.md says so: neighbours in NCCL's rings share a node. The order of nodes is that of their first workers."""
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    placed = [("far", "1"), ("near", "0"), ("far", "0"), ("near", "1"), ("third", "0")]
    workers = [
        SimpleNamespace(metadata=SimpleNamespace(node_id=node, accelerator_ids={"GPU": [gpu]})) for node, gpu in placed
    ]
    ranked = WorkerGroup._sort_workers_by_gpu_id_grouped_by_node(workers)
    found = [(worker.metadata.node_id, worker.metadata.accelerator_ids["GPU"][0]) for worker in ranked]
    assert found == [("far", "0"), ("far", "1"), ("near", "0"), ("near", "1"), ("third", "0")]


def test_ray_core_has_the_names_that_are_read():
    state = importlib.import_module("ray._private.state").state
    assert callable(state.available_resources_per_node)
    assert callable(state.get_draining_nodes)
    assert hasattr(importlib.import_module("ray._private.worker"), "global_worker")


def test_rays_messages_about_processes_can_be_captured(monkeypatch):
    """Ray's listener looks up the function by name and calls it with lines."""
    worker = importlib.import_module("ray._private.worker")
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages)
    taken: list[str] = []
    ray_state.take_messages(taken.append)
    worker.print_to_stdstream({"lines": ["a", "b"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert taken == ["a\nb"]


def test_ray_can_be_started_on_loopback(monkeypatch):
    monkeypatch.setattr(importlib.import_module("ray._private.worker"), "_global_node", None)  # of an earlier test
    services = importlib.import_module("ray._private.services")
    assert "ray_constants.ENABLE_RAY_CLUSTER" in inspect.getsource(services.get_node_ip_address)
    with ray_state.on_loopback():
        assert services.get_node_ip_address() == "127.0.0.1"


def test_ray_can_be_started_without_its_servers():
    node = importlib.import_module("ray._private.node").Node
    started = inspect.getsource(node.start_head_processes) + inspect.getsource(node.start_ray_processes)
    before = [vars(node)[name] for name in ray_state.SERVERS]
    assert all(f"self.{name}(" in started for name in ray_state.SERVERS)
    with ray_state.without_servers():
        assert not set(before) & {vars(node)[name] for name in ray_state.SERVERS}
    assert before == [vars(node)[name] for name in ray_state.SERVERS]


def test_ray_packages_a_folder_as_ray_state_says(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in (".git/HEAD", "code.py", "big.bin", "left.out"):
        (tmp_path / name).write_bytes(b"x" * 100)
    (tmp_path / ".rayignore").write_text("left.out\n")
    found = dict(ray_state.packaged_files(str(tmp_path), ["*.bin"]))
    assert found == {"code.py": 100, ".rayignore": 9}
    assert ray_state.upload_limit() == 100 << 20


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "deepspeed.runtime.zero.stage_1_and_2",
            (
                "single_partition_of_fp32_groups",
                "bit16_groups",
                "params_in_partition",
                "check_grad_overflow",
                "averaged_gradients",
                "all_grad_tensors",
                "parallel_partitioned_bit16_groups",
                "free_grad_in_param_list",
                "micro_step_id",
            ),
        ),
        (
            "deepspeed.runtime.zero.stage3",
            (
                "fp32_partitioned_groups_flat",
                "fp16_groups",
                "_overflow_check_and_loss_scale_update",
                "_loss_scale_update_and_overflow_cleanup",
                "check_overflow",
            ),
        ),
        ("deepspeed.runtime.zero.partition_parameters", ("partition_numel", "ds_numel")),
        ("deepspeed.runtime.fp16.loss_scaler", zero_layout.SCALER),
        ("deepspeed.utils.mixed_precision_linkage", ("_hp_mapping",)),
    ],
)
def test_deepspeed_has_the_names_that_are_read(module, names):
    source = inspect.getsource(importlib.import_module(module))
    assert [name for name in names if name not in source] == []


def test_a_missing_name_of_deepspeed_is_reported():
    with pytest.raises(RuntimeError, match=r"has no Linear\._hp_mapping; .* written for 0\.19\.8"):
        zero_layout.private(torch.nn.Linear(1, 1), "_hp_mapping")
