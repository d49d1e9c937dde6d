"""Copying batches to the device. tests/benchmarks/gpu.py measures the behaviour on a GPU."""

import torch

from pipeline.data.loading.upload import Upload


def test_on_a_cpu_a_batch_is_passed_on_without_a_copy():
    batch = {"image": torch.zeros(2, 4, 4, 3, dtype=torch.uint8), "label": torch.tensor([0, 1]), "key": ["a", "b"]}
    uploaded = Upload("cpu")(batch)
    assert uploaded["image"] is batch["image"]
    assert uploaded["label"] is batch["label"]
    assert uploaded["key"] == ["a", "b"]
