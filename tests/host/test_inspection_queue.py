"""The record among the host's caches: its real executor queues a graph again and again."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import execution
import folder_paths
import pytest
import torch
from sampling import PROMPT, encode, noise, sample

import nodes
from nested_attention.host.apply import apply_subject

ROOT = Path(__file__).parents[2]
LARGE = {"lru": 100, "ram": 0, "ram_inactive": 0}


@pytest.fixture(scope="module")
def inspecting():
    """The two nodes, from the pack imported as the host imports it."""
    spec = importlib.util.spec_from_file_location("pack_that_inspects", ROOT / "__init__.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {node.define_schema().node_id: node for node in sys.modules[f"{spec.name}.nodes.inspect"].NODES}


@pytest.fixture(params=[execution.CacheType.CLASSIC, execution.CacheType.LRU])
def queue(request, inspecting, base_model, base_clip, person, monkeypatch, tmp_path):
    """Queues record, sampler and inspect with these values; returns the sheet, or the error, and what was sampled."""
    sampled = []

    def node(returns, function, **inputs):
        types = {"required": {name: (kind, {}) for name, kind in inputs.items()}}
        body = {"INPUT_TYPES": classmethod(lambda cls: types), "RETURN_TYPES": returns, "FUNCTION": "run"}
        return type("Node", (), {**body, "run": lambda self, **values: function(**values)})

    def source():
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>")
        return model, encode(clip, PROMPT), encode(clip, "bad"), person

    def sampler(model, positive, negative, seed):
        sampled.append(seed)
        return (sample(model, positive, negative, latent=noise(seed=seed)),)

    mappings = {
        **inspecting,
        "Source": node(("MODEL", "CONDITIONING", "CONDITIONING", "NESTED_SUBJECT"), source),
        "Sampler": node(
            ("IMAGE",), sampler, model="MODEL", positive="CONDITIONING", negative="CONDITIONING", seed="INT"
        ),
        "Decode": node(("IMAGE",), lambda latent: (latent[:, :3].movedim(1, -1).clamp(0, 1),), latent="IMAGE"),
        "Keep": type("Keep", (node((), lambda image: {}, image="IMAGE"),), {"OUTPUT_NODE": True}),
    }
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", mappings)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
    executor = execution.PromptExecutor(server, request.param, LARGE)

    def run(seed, view="attention", limit_mb=10, inspect=True):
        prompt = {
            "1": ("Source", {}),
            "2": ("NestedAttentionRecord", {"model": ["1", 0], "steps": "all", "layers": "", "picture": 0}),
            "3": ("Sampler", {"model": ["2", 0], "positive": ["1", 1], "negative": ["1", 2], "seed": seed}),
            "4": ("Decode", {"latent": ["3", 0]}),
            "5": ("NestedAttentionInspect", {"record": ["2", 1], "subject": ["1", 3], "generated": ["4", 0]}),
            "6": ("Keep", {"image": ["4", 0]}),
        }
        prompt["2"][1]["limit_mb"] = limit_mb
        prompt["5"][1].update(view=view, points="0.5,0.5", layers="")
        if not inspect:
            del prompt["5"]
        prompt = {i: {"class_type": kind, "inputs": inputs} for i, (kind, inputs) in prompt.items()}
        sampled.clear()
        ends = ["5"] if inspect else ["6"]
        asyncio.run(executor.execute_async(prompt, f"{seed} {view} {limit_mb}", {}, ends))
        if not executor.success:
            return next(data["exception_message"] for event, data in executor.status_messages if "error" in event), []
        found = asyncio.run(executor.caches.outputs.get("5")) if inspect else None
        return None if found is None else found.outputs[0][0], list(sampled)

    run.keeps_old_results = request.param is execution.CacheType.LRU
    return run


def test_queued_again_and_with_another_view(queue):
    first, sampled = queue(1)
    assert sampled == [1] and first.shape[0] == 1
    again, sampled = queue(1)
    assert sampled == [] and torch.equal(again, first)
    values, sampled = queue(1, view="values")
    assert sampled == [] and values.shape != first.shape
    other, sampled = queue(2)
    assert sampled == [2] and not torch.equal(other, first)


def test_back_at_an_earlier_seed(queue):
    """A cache that keeps old results hands out the first picture, while the model has sampled the second since."""
    first, _ = queue(1)
    queue(2)
    answer, sampled = queue(1, view="values")
    if not queue.keeps_old_results:
        assert sampled == [1] and isinstance(answer, torch.Tensor)
        return
    assert "of another run (seed 1)" in answer and "change a value of Record Nested Attention" in answer
    anew, sampled = queue(1, limit_mb=11)
    assert sampled == [1] and first.shape == anew.shape


def test_added_behind_a_picture_that_is_there(queue):
    _, sampled = queue(1, inspect=False)
    assert sampled == [1]
    sheet, sampled = queue(1)
    assert sampled == [] and sheet.shape[0] == 1
