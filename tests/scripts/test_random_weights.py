"""Generated weights: the same every time, well scaled, and files that safetensors reads."""

import pytest
import torch
from safetensors import safe_open

from scripts.random_weights import random_tensor, write_random

SHAPES = {"block.to_q.weight": (64, 256), "block.norm.weight": (256,), "block.norm.bias": (256,), "logit_scale": ()}


def test_files_hold_what_was_described(tmp_path):
    path = tmp_path / "folder" / "model.safetensors"
    write_random(path, SHAPES, {"made_by": "a test"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"made_by": "a test"}
        assert set(file.keys()) == set(SHAPES)
        for name, shape in SHAPES.items():
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16 and tuple(tensor.shape) == shape
            assert torch.equal(tensor, random_tensor(name, shape, "model"))


def test_layers_keep_the_scale_of_their_input():
    weight = random_tensor("block.to_q.weight", (64, 256), "model").float()
    assert (weight @ torch.randn(256, 1000)).std() == pytest.approx(1.0, abs=0.1)


def test_names_and_seeds_tell_weights_apart():
    one, other = (random_tensor("a.weight", (8, 8), seed) for seed in ("person", "dog"))
    assert not torch.equal(one, other)
    assert not torch.equal(one, random_tensor("b.weight", (8, 8), "person"))


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError):
        write_random(tmp_path / "model.safetensors", {"a.weight": (-1, 2)})
    assert not (tmp_path / "model.safetensors").exists()
