"""Training as a step of a graph: seen on the node, ended by Cancel at any moment, and the host as it was afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest
import torch
from comfy.model_management import InterruptProcessingException, interrupt_current_processing
from small_models import make_adapter
from small_training import losses, make_base, make_data, settings

from nested_attention.files import read_adapter
from nested_attention.host import graph_training
from nested_attention.host.adapters import load_adapter, save_adapter
from nested_attention.host.graph_training import store_pictures, train_in_graph, trained
from nested_attention.host.layers import cross_attention_sites
from nested_attention.host.objective import DiffusionObjective
from nested_attention.host.train import ADAPTER
from nested_attention.training.checkpoint import load_checkpoint
from nested_attention.training.config import TrainingError
from nested_attention.training.entries import read_dataset
from nested_attention.training.pictures import read_picture
from nested_attention.training.troubles import Troubles


@pytest.fixture(autouse=True)
def as_the_host_runs_nodes(monkeypatch):
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)  # or fast steps go unseen
    with torch.inference_mode():
        yield
    interrupt_current_processing(False)
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture
def base():
    return make_base()


@pytest.fixture
def folder(tmp_path):
    return make_data(tmp_path)


def unchanged(base):
    """Calls that hold the host's state before, and compare it after."""
    unet = base.model.model.diffusion_model
    weights = [p.clone() for module in base.modules() for p in module.parameters()]
    options = repr(base.model.model_options)

    def check():
        parameters = [p for module in base.modules() for p in module.parameters()]
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(weights, parameters, strict=True))
        assert not any(p.requires_grad or p.grad is not None for p in unet.parameters())
        assert not any("forward" in vars(module) for module in unet.modules())
        assert repr(base.model.model_options) == options and torch.is_inference_mode_enabled()

    for parameter in (p for module in base.modules() for p in module.parameters()):
        parameter.requires_grad_(False)
    return check


def on_progress(call):
    seen = []

    def hook(value, total, preview, node_id=None):
        seen.append((value, total, preview))
        call(value)

    comfy.utils.set_progress_bar_global_hook(hook)
    return seen


def test_progress_and_samples_are_shown(base, folder):
    seen = on_progress(lambda value: None)
    config = settings(folder, validate_every=2, validation_prompts=("a <person>",), learning_rate=0.1)
    assert train_in_graph(config, base) == 4
    assert seen[-1][:2] == (4, 4)
    kind, picture, side = seen[-1][2]
    assert (kind, side) == ("JPEG", 512) and sum(preview is not None for *_, preview in seen) == 2
    adapter, curve, sample = trained(folder / "out")
    assert curve.shape == (1, 400, 800, 3) and sample.shape == (1, picture.height, picture.width, 3)
    assert picture.width == 2 * 32 or picture.width > picture.height  # the subject, and what was drawn
    first, last = (read_picture(folder / "out" / "validation" / f"000000{step}.png") for step in (2, 4))
    assert torch.equal(sample, last) and not torch.equal(sample, first)
    assert adapter.name == "out.safetensors" and adapter.config.queries == 6
    maps = Path("/proc/self/maps")  # Windows would let nobody write a mapped file again
    assert not maps.exists() or str(folder / "out" / ADAPTER) not in maps.read_text()
    assert train_in_graph(config, base) == 0


def test_what_a_training_warns_of_stays_on_its_node(base, folder, monkeypatch):
    """While steps are shown, and in the end; another base model and other settings are told of."""
    shown = []
    monkeypatch.setattr(graph_training, "show", lambda *said: shown.append(said))
    config = settings(folder, steps=2)
    assert train_in_graph(config, base, node_id="7") == 2
    report = f"2 steps, 2 in all. The run is in {config.output}."
    assert shown[-1] == (report, "7", False)
    assert train_in_graph(config, base, node_id="7") == 0
    (text, node, warning) = shown[-1]
    assert "had all its steps: 2." in text and (node, warning) == ("7", True)

    with torch.no_grad():
        next(base.model.model.diffusion_model.parameters()).add_(0.1)
    monkeypatch.setattr(graph_training, "SHOW_AFTER", 0.0)
    assert train_in_graph(replace(config, steps=4, learning_rate=0.5), base, node_id="7") == 2
    told = "other settings than it had: learning_rate: 0.5, was "
    assert all(told in text and "another base model" in text for text, *_ in shown[-3:])
    assert shown[-1][0].endswith("2 steps, 4 in all. The run is in " + config.output + ".") and shown[-1][2]


def test_what_cannot_be_trained_on_is_named(base, folder, monkeypatch):
    for name in ("model", "clip", "vae", "clip_vision"):
        with pytest.raises(ValueError, match=f"^{name} is empty: .* Load one with"):
            train_in_graph(settings(folder), replace(base, **{name: None}))
    monkeypatch.setattr(base.model, "is_dynamic", lambda: True)
    with pytest.raises(TrainingError, match="A model of this loader cannot be trained on"):
        train_in_graph(settings(folder), base)


@pytest.mark.parametrize("place", ["between steps", "inside a step"])
def test_cancel_keeps_what_was_learnt(base, folder, monkeypatch, place):
    check = unchanged(base)
    straight = settings(folder, gradient_checkpointing=True)
    assert train_in_graph(straight, base) == 4
    parts = settings(folder, output=str(folder / "parts"), gradient_checkpointing=True, checkpoint_every=100)
    with monkeypatch.context() as patches:
        if place == "between steps":
            on_progress(lambda value: value == 3 and interrupt_current_processing())
        else:
            denoise, calls = DiffusionObjective.denoise, []

            def cancelled(self, *args):
                calls.append(args)
                interrupt_current_processing(len(calls) == 4)
                return denoise(self, *args)

            patches.setattr(DiffusionObjective, "denoise", cancelled)
        with pytest.raises(InterruptProcessingException):
            train_in_graph(parts, base)
    check()
    assert not comfy.model_management.processing_interrupted()
    assert load_checkpoint(folder / "parts" / "checkpoint.pt")["step"] == 3 and len(losses(parts)) == 3
    adapter, curve, sample = trained(folder / "parts")
    assert json.loads(adapter.patcher.model.notes["training"])["steps"] == 3
    assert sample.shape == (1, 64, 64, 3) and sample.max() == 0
    comfy.utils.set_progress_bar_global_hook(None)
    assert train_in_graph(parts, base) == 1
    assert losses(parts) == losses(straight)
    check()


def test_an_error_leaves_the_host_as_it_was(base, folder, monkeypatch):
    check = unchanged(base)
    monkeypatch.setattr(DiffusionObjective, "weight", lambda self, sigma: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_in_graph(settings(folder, gradient_checkpointing=True), base)
    check()


def test_an_adapter_is_trained_further_and_saved_with_its_notes(base, folder):
    sites = cross_attention_sites(base.model.model.diffusion_model)
    path = make_adapter(folder / "start.safetensors", sites, queries=5, norm="clamp")
    start = load_adapter(str(path), path.name, norm="off")
    before = {name: tensor.clone() for name, tensor in start.patcher.model.state_dict().items()}
    config = settings(folder, start_from=start.name, learning_rate=0.0, weight_decay=0.0, steps=1)
    assert train_in_graph(config, base, start=start) == 1
    adapter, _, _ = trained(folder / "out")
    save_adapter(adapter, str(folder / "saved.safetensors"))
    saved = read_adapter(folder / "saved.safetensors")
    assert saved.config == adapter.config and (saved.config.queries, saved.config.norm) == (5, "off")
    record = json.loads(saved.notes["training"])
    assert record["settings"]["start_from"] == "start.safetensors" and "11 cross-attention" in record["base_model"]
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, before[name]) and torch.equal(start.patcher.model.state_dict()[name], before[name])


def test_an_adapter_is_saved_in_its_precision(base, folder):
    sites = cross_attention_sites(base.model.model.diffusion_model)
    start = load_adapter(str(make_adapter(folder / "start.safetensors", sites)), "start.safetensors")
    start.patcher.model.half()
    save_adapter(start, str(folder / "half.safetensors"))
    assert {p.dtype for p in read_adapter(folder / "half.safetensors").parameters()} == {torch.float16}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_that_came_as_tensors(folder, channels):
    images, crops = torch.rand(2, 20, 30, channels), torch.rand(2, 8, 8, 3)
    captions = ["a <person>", "a person reads"]
    path = store_pictures(folder / "run", images, captions, crops)
    entries = read_dataset(settings(folder, data=str(path)), Troubles("stop"))
    assert [e.caption for e in entries] == ["a <person>", "a <person> reads"]
    for entry, image, crop in zip(entries, images, crops, strict=True):
        color, alpha = (
            (image[..., :1].expand(20, 30, 3), image[..., 1:]) if channels < 3 else (image[..., :3], image[..., 3:])
        )
        expected = torch.cat((color, alpha), dim=-1)
        torch.testing.assert_close(read_picture(entry.image)[0], expected, rtol=0, atol=0.5001 / 255)
        torch.testing.assert_close(read_picture(entry.crop)[0], crop, rtol=0, atol=0.5001 / 255)
    assert store_pictures(folder / "run", images, captions, crops).read_text() == path.read_text()
    fewer = store_pictures(folder / "run", images[:1], captions[:1], None)
    assert len(read_dataset(settings(folder, data=str(fewer)), Troubles("stop"))) == 1
