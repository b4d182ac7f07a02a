"""Training through the host: the forward is sampling's, the base stays as it was, what is learnt is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from PIL import Image
from sampling import sample
from small_models import make_model
from small_training import bind, exact, losses, make_base, make_data, save_picture, settings

from nested_attention.files import read_adapter, read_tensors, write_adapter
from nested_attention.host import patch
from nested_attention.host.adapters import load_adapter
from nested_attention.host.apply import apply_subject
from nested_attention.host.base import DTYPES, attention_at, fresh_adapter
from nested_attention.host.layers import cross_attention_sites
from nested_attention.host.train import train
from nested_attention.training import __main__ as command
from nested_attention.training.checkpoint import load_checkpoint
from nested_attention.training.config import TrainingError
from nested_attention.training.samples import Plan
from nested_attention.training.trainer import Projector


@pytest.fixture(scope="module")
def base():
    return make_base()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("training"))


def test_a_fresh_adapter_starts_from_the_layers_own_projections(base, folder):
    adapter = fresh_adapter(settings(folder), base)
    unet = base.model.model.diffusion_model
    for site, layer in zip(cross_attention_sites(unet), adapter.layers, strict=True):
        attention = attention_at(unet, site)
        assert torch.equal(layer.to_k.weight, attention.to_k.weight)
        assert torch.equal(layer.to_v.weight, attention.to_v.weight)
    again = fresh_adapter(settings(folder), base)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


def test_a_fresh_adapter_is_as_the_settings_say(base, folder):
    said = {"queries": 7, "dim": 48, "depth": 2, "dim_head": 12, "ff_mult": 3, "feature_layer": "penultimate"}
    said |= {"norm": "clamp", "norm_factor": 3.5, "class_word": "cat"}
    config = fresh_adapter(settings(folder, **said), base).config
    assert {name: getattr(config, name) for name in said} == said
    assert (config.heads, config.image_dim, config.output_dim, len(config.layers)) == (4, 48, 96, 11)


def test_first_values_make_up_for_little_attention(base, folder, tmp_path, monkeypatch):
    """Heads whose softmax gives the word less than the share have values that much larger; none has smaller ones."""
    shares = {}

    def watched(self, q, k, v, options, layout):
        if layout.watch is not None:
            exact_q, exact_k, heads = q.cpu().double(), k.cpu().double(), options["n_heads"]
            width = q.shape[-1] // heads
            parts = [(exact_q[..., i : i + width], exact_k[..., i : i + width]) for i in range(0, heads * width, width)]
            p = torch.stack([(a @ b.transpose(1, 2) / width**0.5).softmax(-1) for a, b in parts]).mean(2)
            columns = [(row, use.columns) for rows in layout.groups for row in range(*rows[:2]) for use in rows.uses]
            shares[self.index] = torch.stack([p[:, row, list(at)].sum(-1) for row, at in columns]).mean(0)
        return inner(self, q, k, v, options, layout)

    inner = patch.LayerPatch.attend_personalized
    monkeypatch.setattr(patch.LayerPatch, "attend_personalized", watched)
    share = 0.02
    changes = {
        "norm": "off",
        "steps": 1,
        "batch": 3,
        "weight_decay": 0.0,
        "warmup": 0,
        "ema": 0.0,
        "value_share": share,
    }
    for name, rate in {"still": 0.0, "moved": 1e-3}.items():
        train(settings(folder, learning_rate=rate, output=str(tmp_path / name), **changes), base)
    trained, moved = (read_adapter(tmp_path / name / "adapter.safetensors") for name in ("still", "moved"))
    own = fresh_adapter(settings(folder), base)
    factors = {index: (share / p).clamp(1, 100).float() for index, p in shares.items()}
    assert len(factors) == len(own.layers)
    assert max(f.max() for f in factors.values()) > 1.2 and min(f.min() for f in factors.values()) == 1, factors
    for index, factor in factors.items():
        expected = own.layers[index].to_v.weight.unflatten(0, (len(factor), -1)) * factor[:, None, None]
        torch.testing.assert_close(trained.layers[index].to_v.weight, expected.flatten(0, 1))
        assert torch.equal(trained.layers[index].to_k.weight, own.layers[index].to_k.weight)
        steps = (moved.layers[index].to_v.weight - trained.layers[index].to_v.weight).unflatten(0, (len(factor), -1))
        torch.testing.assert_close(steps.abs().amax((1, 2)), 1e-3 * factor, rtol=1e-2, atol=0)  # Adam's first


def test_an_adapter_for_a_quantized_model(base, folder, monkeypatch):
    """Its weights are small numbers and scales, which a plain weight cannot copy."""
    kept = fresh_adapter(settings(folder), base)
    attention = attention_at(
        base.model.model.diffusion_model, cross_attention_sites(base.model.model.diffusion_model)[0]
    )
    quantized = QuantizedTensor.from_float(attention.to_k.weight.detach(), "TensorCoreFP8Layout")
    monkeypatch.setitem(attention.to_k._parameters, "weight", torch.nn.Parameter(quantized, requires_grad=False))
    first = fresh_adapter(settings(folder), base).layers[0].to_k.weight
    torch.testing.assert_close(first, kept.layers[0].to_k.weight, rtol=0.07, atol=1e-3)


def test_the_precision_is_the_models(base, folder, tmp_path):
    """The host decides by the device: where bf16 is asked for and fp32 is computed, nothing is cast."""
    assert train(settings(folder, output=str(tmp_path), precision="bf16", steps=1), base)
    record = json.loads(read_tensors(tmp_path / "adapter.safetensors")[1]["training"])
    assert record["settings"]["precision"] == "fp32"


def test_what_is_written_is_the_running_mean(base, folder, tmp_path):
    assert train(settings(folder, output=str(tmp_path), ema=0.9, learning_rate=0.01), base)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    for name, value in read_adapter(tmp_path / "adapter.safetensors").state_dict().items():
        assert torch.equal(value, state["average"][name]), name
    assert not torch.equal(state["average"]["layers.0.to_k.weight"], state["adapter"]["layers.0.to_k.weight"])


def test_the_base_model_stays_frozen(base, folder, tmp_path):
    """Though its weights ask for gradients."""
    parameters = [p for module in base.modules() for p in module.parameters()]
    before, required = [p.clone() for p in parameters], [p.requires_grad for p in parameters]
    config = settings(folder, output=str(tmp_path), gradient_checkpointing=True, learning_rate=0.1, steps=2)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        assert train(config, base)
        assert all(p.requires_grad and p.grad is None for p in parameters)
    finally:
        for parameter, asked in zip(parameters, required, strict=True):
            parameter.requires_grad_(asked)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert not base.model.model_options["transformer_options"].get("patches_replace")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_in_full(base, folder, tmp_path, precision, monkeypatch):
    """The adapter computes in it, and in fp16 its gradients are scaled; its weights stay fp32."""
    computed = []
    forward = Projector.forward
    monkeypatch.setattr(Projector, "forward", lambda *given: computed.append(forward(*given)) or computed[-1])
    half = replace(base, model=make_model(DTYPES[precision], DTYPES[precision]))
    config = settings(folder, output=str(tmp_path), precision=precision, steps=2)
    assert train(config, half)
    assert {x.dtype for pairs in computed for pair in pairs for x in pair} == {DTYPES[precision]}
    assert bool(load_checkpoint(tmp_path / "checkpoint.pt")["scaler"]) == (precision == "fp16")
    full = settings(folder, output=str(tmp_path / "full"), steps=1)
    assert train(full, base)
    assert losses(config)[1] == pytest.approx(losses(full)[1], rel=0.05)
    assert {p.dtype for p in read_adapter(tmp_path / "adapter.safetensors").parameters()} == {torch.float32}


def test_a_base_that_nodes_loaded(folder, tmp_path):
    """The host runs nodes in inference mode, whose tensors autograd refuses."""
    with torch.inference_mode():
        base = make_base()
        with torch.inference_mode(False):
            assert train(settings(folder, output=str(tmp_path), steps=1), base)
        adapter = load_adapter(str(tmp_path / "adapter.safetensors"), "adapter.safetensors")
        bound = bind(adapter.patcher.model.resampler(torch.randn(1, 17, 48)), adapter)
        model, clip = apply_subject(base.model, base.clip, bound, placeholder="<person>")
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("a <person>"))
        assert sample(model, positive, positive).isfinite().all()


def test_one_picture_is_learnt(base, tmp_path, monkeypatch):
    """With the same noise at each step, as the loss depends on it more than on what is learnt."""
    make_data(tmp_path, count=1)
    rows = Plan.rows
    monkeypatch.setattr(Plan, "rows", lambda plan, number: rows(plan, 0))
    config = settings(tmp_path, steps=20, learning_rate=2e-2, norm="off", min_snr_gamma=1.0, cache=True)
    assert train(config, base)
    assert losses(config)[20] < 0.7 * losses(config)[1]


@exact
def test_resumed_is_uninterrupted(base, folder, tmp_path, caplog):
    """With everything that draws: augmentation, dropout, noise, several buckets."""
    caplog.set_level("INFO")
    changes = {"augment": 1.0, "caption_dropout": 0.3, "subject_dropout": 0.3, "norm": "off", "value_share": 0.1}
    straight = settings(folder, output=str(tmp_path / "straight"), **changes)
    assert train(straight, base)
    parts = settings(folder, output=str(tmp_path / "parts"), **changes)
    calls = iter([False, True])
    assert not train(parts, base, stop=lambda: next(calls))
    so_far = read_tensors(tmp_path / "parts" / "adapter.safetensors")[1]["training"]
    assert json.loads(so_far)["steps"] == 2 and "Going on" not in caplog.text
    assert train(parts, base) and "Going on from step 2 of" in caplog.text
    assert losses(parts) == losses(straight) and len(losses(parts)) == 4
    a, b = (read_tensors(tmp_path / name / "adapter.safetensors") for name in ("straight", "parts"))
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    record = json.loads(a[1]["training"])
    assert record["steps"] == 4 and record["entries"] == 3 and record["settings"]["data"] == "data"
    assert str(tmp_path) not in a[1]["training"]


def test_a_finished_run_is_left_as_it_is(base, folder, tmp_path, caplog):
    config = settings(folder, output=str(tmp_path / "done"), steps=2)
    path = tmp_path / "done" / "adapter.safetensors"
    assert train(config, base)
    before = path.read_bytes()
    assert train(replace(config, steps=1, learning_rate=0.5), base)
    assert "had all its steps: 2." in caplog.text and "other settings" not in caplog.text
    assert path.read_bytes() == before
    path.unlink()
    assert train(config, base) and path.exists()
    write_adapter(read_adapter(path), path, notes={"training": '{"steps": 1}'})  # killed before it was written anew
    assert train(config, base)
    assert json.loads(read_tensors(path)[1]["training"])["steps"] == 2


def test_an_adapter_to_start_from_keeps_its_shape(base, folder, tmp_path, caplog):
    """And the record tells what it has, not what was asked for or is usual."""
    write_adapter(
        fresh_adapter(settings(folder, queries=5, norm="clamp", class_word="dog"), base), tmp_path / "start.safetensors"
    )
    asked = {"start_from": str(tmp_path / "start.safetensors"), "queries": 8, "feature_layer": "penultimate"}
    assert train(settings(folder, output=str(tmp_path / "out"), steps=1, **asked), base)
    assert "keeps its own shape: queries 5, not 8; feature_layer last, not penultimate." in caplog.text
    adapter = read_adapter(tmp_path / "out" / "adapter.safetensors")
    told = json.loads(adapter.notes["training"])["settings"]
    assert (told["queries"], told["norm"], told["feature_layer"]) == (5, "clamp", "last")
    assert (adapter.config.queries, adapter.config.norm, adapter.config.class_word) == (5, "clamp", "person")
    with pytest.raises(TrainingError, match="begin from start.safetensors again, or choose another output"):
        train(settings(folder, output=str(tmp_path / "out"), steps=2, queries=8), base)


def test_what_was_skipped_is_told_after_an_interruption(base, folder, tmp_path, monkeypatch):
    """Once, though it is found again: left out of the data, or found to be broken on the way."""
    lines = [
        {"image": "gone.png", "caption": "a person"},
        *({"image": f"{i}.png", "caption": "a person"} for i in "012"),
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i in range(3):
        save_picture(tmp_path / f"{i}.png", i)
    picture = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(picture[: len(picture) // 2])
    data = {"data": str(tmp_path / "data.jsonl"), "on_error": "skip", "batch": 3, "buckets": False, "prefetch": 0}
    for steps, mended in ((1, False), (2, False), (3, True)):
        if mended:
            (tmp_path / "1.png").write_bytes(picture)
        assert train(settings(folder, output=str(tmp_path / "out"), steps=steps, **data), base)
        told = json.loads(read_tensors(tmp_path / "out" / "adapter.safetensors")[1]["training"])
        assert (told["steps"], told["entries"], told["skipped"]) == (steps, 3, 2)
    for i in range(3):  # each of them may be the one that is held out
        (tmp_path / f"{i}.png").write_bytes(picture[: len(picture) // 2] if i != 1 else picture)
    held = {**data, "holdout": 1, "seed": 1, "batch": 1}
    assert train(settings(folder, output=str(tmp_path / "held"), steps=3, **held), base)
    told = json.loads(read_tensors(tmp_path / "held" / "adapter.safetensors")[1]["training"])
    assert (told["entries"], told["skipped"]) == (2, 3)


def test_a_fresh_adapter_at_strength_zero_is_the_host(base, folder, tmp_path):
    adapter = fresh_adapter(settings(folder), base)
    write_adapter(adapter, tmp_path / "fresh.safetensors")
    loaded = load_adapter(str(tmp_path / "fresh.safetensors"), "fresh.safetensors")
    bound = bind(adapter.resampler(torch.randn(1, 17, 48)).detach(), loaded)
    model, clip = apply_subject(base.model, base.clip, bound, placeholder="<person>", strength=0.0)
    ours, plain = clip.tokenize("a <person>"), base.clip.tokenize("a person")
    positive, expected = clip.encode_from_tokens_scheduled(ours), base.clip.encode_from_tokens_scheduled(plain)
    assert torch.equal(sample(model, positive, positive), sample(base.model, expected, expected))


def test_the_command(base, folder, tmp_path, monkeypatch):
    """From a file of settings, with validation pictures, then further from its own adapter."""
    monkeypatch.setattr("nested_attention.host.base.load_base", lambda config: base)
    monkeypatch.setattr(command, "find_host", lambda: None)
    values = {**settings(folder).record(), "data": str(folder / "data"), "output": str(tmp_path / "a"), "steps": 2}
    values |= {"holdout": 1, "validation_prompts": ["a Person", "a <person>"], "validate_every": 2}
    values |= {"norm": "off", "value_share": 0.1}
    (tmp_path / "settings.json").write_text(json.dumps(values))
    monkeypatch.setattr("sys.argv", ["train", "--config", str(tmp_path / "settings.json")])
    command.main()
    files = {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.*")}
    assert {"adapter.safetensors", "checkpoint.pt", "loss.png", "loss.jsonl", "validation/0000002.png"} <= files
    assert Image.open(tmp_path / "a/validation/0000002.png").width > 32
    _, *drawn = np.split(np.asarray(Image.open(tmp_path / "a/validation/0000002.png")), 3, axis=1)
    assert np.array_equal(*drawn) and drawn[0].std() > 0  # the class word and the placeholder are the same subject
    last = json.loads((tmp_path / "a/loss.jsonl").read_text().splitlines()[-1])
    assert last["validation"] > 0
    further = [
        "--value-share",
        "0",
        "--output",
        str(tmp_path / "b"),
        "--start-from",
        str(tmp_path / "a/adapter.safetensors"),
    ]
    monkeypatch.setattr("sys.argv", ["train", "--config", str(tmp_path / "settings.json"), *further, "--batch", "1"])
    command.main()
    assert read_adapter(tmp_path / "b" / "adapter.safetensors").config == read_adapter(further[-1]).config
