"""Training through the host: the forward is sampling's, the base stays as it was, what is learnt is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import comfy.model_sampling
import comfy.samplers
import numpy as np
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from equations import Stands, expected_model
from PIL import Image
from reference import nested_attention
from sampling import guide, noise, sample
from small_models import make_model
from small_training import exact, losses, make_base, make_data, make_reader, samples_of, save_picture, settings

from nested_attention.crop import FITS
from nested_attention.files import read_adapter, read_tensors, write_adapter
from nested_attention.host import patch
from nested_attention.host.adapters import BoundSubject, load_adapter
from nested_attention.host.apply import apply_subject
from nested_attention.host.base import DTYPES, attention_at, checkpointed, fresh_adapter
from nested_attention.host.images import encode
from nested_attention.host.layers import cross_attention_sites
from nested_attention.host.objective import DiffusionObjective, told_sizes
from nested_attention.host.train import make_adapter, train
from nested_attention.subject import Subject
from nested_attention.training import __main__ as command
from nested_attention.training.checkpoint import load_checkpoint
from nested_attention.training.config import TrainingError
from nested_attention.training.entries import read_dataset
from nested_attention.training.samples import Plan, Row, Sample
from nested_attention.training.trainer import Projector
from nested_attention.training.troubles import Troubles


@pytest.fixture(scope="module")
def base():
    return make_base()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("training"))


def objective_of(base, config):
    """An objective, its adapter, and the samples of the first batch."""
    adapter = make_adapter(config, base)
    objective = DiffusionObjective(base, adapter, config)
    reader = make_reader(read_dataset(config, Troubles("stop")), config)
    return objective, adapter, samples_of(reader)


def gradients(base, objective, adapter, samples):
    adapter.zero_grad()
    with base.frozen():
        objective(Projector(adapter), samples).backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


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


def denoised(model, positive, noisy, sigma):
    """What a sampler is given by the model at one step, without guidance."""
    seen = []

    def look(inner, noise, sigmas, extra_args=None, callback=None, disable=None):
        seen.append(inner(noisy, sigma, **extra_args))
        return noise

    guider = guide(model, positive, positive, cfg=1.0)
    sampler = comfy.samplers.KSAMPLER(look)
    guider.sample(noise(size=noisy.shape[2:]), torch.zeros_like(noisy), sampler, torch.cat((sigma, sigma * 0)), seed=1)
    return seen[0]


def test_training_forward_is_samplings_forward(base, folder, tmp_path):
    """Each row of a batch with different pictures and captions, through Apply Subject and the host's guider."""
    config = settings(folder, batch=3)
    objective, adapter, samples = objective_of(base, config)
    path = tmp_path / "adapter.safetensors"
    write_adapter(adapter, path)
    loaded = load_adapter(str(path), path.name)
    with torch.no_grad():
        batch = objective.prepare(samples)
        assert len(batch.groups) >= 2
        trained = objective.denoise(batch, Projector(adapter)(batch.features))
        for i in range(3):
            tokens = adapter.resampler(batch.features[i : i + 1])
            bound = bind(tokens, loaded)
            model, clip = apply_subject(base.model, base.clip, bound, placeholder="<person>")
            text = batch.conds["c_crossattn"][i]
            clean = batch.clean[i : i + 1]
            sample = next(s for s in samples if torch.equal(objective.latent(s).to(clean), clean))
            caption = sample.caption
            positive = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
            positive[0][1].update(told_sizes(sample))  # as CLIPTextEncodeSDXL does
            assert torch.equal(positive[0][0][0], text.cpu())
            step = (batch.noisy[i : i + 1], batch.sigma[i : i + 1])
            sampled = denoised(model, positive, *step)
            torch.testing.assert_close(trained[i : i + 1].cpu(), sampled.cpu(), rtol=1e-4, atol=1e-4)
            column = clip.tokenize(caption)["l"][0]
            column = next(c for c, (token, *_) in enumerate(column) if hasattr(token, "nested_placeholder"))
            equations = expected_model(base.model, objective.sites, [(positive[0][0][0], [Stands(bound, (column,))])])
            torch.testing.assert_close(sampled, denoised(equations, positive, *step), rtol=1e-3, atol=1e-3)


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


def test_sizes_are_told():
    """The host's own default for pictures that fill their bucket; else what is blurred, and what lies outside."""
    row = Row(0, (64, 64), 0)
    told = {size: told_sizes(Sample(row, None, None, "", size)) for size in ((64, 64), (128, 128), (32, 24), (96, 64))}
    full = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
    assert told[64, 64] == told[128, 128] == full
    assert told[32, 24] == {**full, "width": 32, "height": 24, "crop_w": 10}
    assert told[96, 64] == {**full, "width": 96, "crop_w": 16}


def test_a_model_that_another_node_patched_is_refused(base, folder):
    model = base.model.clone()
    model.set_model_attn2_replace(lambda *_: None, "input", 1)
    with pytest.raises(TrainingError, match="Another node replaces the model's cross-attention"):
        objective_of(replace(base, model=model), settings(folder))


def test_the_precision_is_the_models(base, folder, tmp_path):
    """The host decides by the device: where bf16 is asked for and fp32 is computed, nothing is cast."""
    assert train(settings(folder, output=str(tmp_path), precision="bf16", steps=1), base)
    record = json.loads(read_tensors(tmp_path / "adapter.safetensors")[1]["training"])
    assert record["settings"]["precision"] == "fp32"


def bind(tokens, loaded):
    return BoundSubject(Subject(tokens, loaded.fingerprint, loaded.name), loaded)


def test_the_loss_is_the_error_of_the_models_own_target(base, folder):
    """By hand, of a model of epsilon: from what is predicted of the clean picture, back to the noise that was added."""
    objective, adapter, samples = objective_of(base, settings(folder, batch=3))
    with torch.no_grad(), base.frozen():
        batch = objective.prepare(samples)
        noise, predicted = (
            (batch.noisy - picture) / batch.sigma.view(-1, 1, 1, 1)
            for picture in (batch.clean, objective.denoise(batch, Projector(adapter)(batch.features)))
        )
        loss = objective(Projector(adapter), samples)
    torch.testing.assert_close(loss, (noise - predicted).square().mean(), rtol=1e-3, atol=1e-5)
    assert min((noise[i] - noise[i - 1]).abs().max() for i in range(3)) > 0.1  # each row has its own
    torch.testing.assert_close(noise.std(), torch.tensor(1.0), rtol=0.2, atol=0)


def test_what_is_written_is_the_running_mean(base, folder, tmp_path):
    assert train(settings(folder, output=str(tmp_path), ema=0.9, learning_rate=0.01), base)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    for name, value in read_adapter(tmp_path / "adapter.safetensors").state_dict().items():
        assert torch.equal(value, state["average"][name]), name
    assert not torch.equal(state["average"]["layers.0.to_k.weight"], state["adapter"]["layers.0.to_k.weight"])


def test_gradients_are_those_of_the_equations(base, folder, monkeypatch):
    """With every layer's change computed one query at a time; later layers pass gradients on to earlier ones."""
    objective, adapter, samples = objective_of(base, settings(folder, min_snr_gamma=5.0))
    fast = gradients(base, objective, adapter, samples)

    def slowly(out, q, k, v, tokens, *_):
        rows = [[replace(t, keys=t.keys[i : i + 1], values=t.values[i : i + 1]) for t in tokens] for i in range(len(q))]
        return out.copy_(nested_attention(q, k, v, rows))

    monkeypatch.setattr(patch, "personalize", slowly)
    slow = gradients(base, objective, adapter, samples)
    for name, expected in slow.items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(fast[name], expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item(), msg=name)


@exact
def test_checkpointed_gradients_are_the_same(base, folder):
    objective, adapter, samples = objective_of(base, settings(folder))
    unet = base.model.model.diffusion_model
    plain = gradients(base, objective, adapter, samples)
    with checkpointed(unet):
        assert any("forward" in vars(module) for module in unet.modules())
        again = gradients(base, objective, adapter, samples)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert not any("forward" in vars(module) for module in unet.modules())


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


def test_weights_are_those_of_each_kind_of_model(base, folder, monkeypatch):
    """The host's own scalings: the plain loss is the error of the model's output, whatever that output is."""
    objective, _, _ = objective_of(base, settings(folder))
    sigma = torch.tensor([0.1, 0.7])
    for kind in (comfy.model_sampling.EPS, comfy.model_sampling.V_PREDICTION, comfy.model_sampling.CONST):
        sampling = type("Sampling", (comfy.model_sampling.ModelSamplingDiscrete, kind), {})()
        monkeypatch.setattr(objective, "sampling", sampling)
        x, right, wrong = torch.randn(3, 2, 4, 4, 4)
        error = sampling.calculate_denoised(sigma, right, x) - sampling.calculate_denoised(sigma, wrong, x)
        mine = objective.weight(sigma) * error.square().flatten(1).mean(1)
        torch.testing.assert_close(mine, (right - wrong).square().flatten(1).mean(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "sigma"),
    [
        (comfy.model_sampling.EPS, (0.1, 2.0)),  # SNR sigma^-2: 100 and 0.25
        (comfy.model_sampling.V_PREDICTION, (0.1, 2.0)),
        (comfy.model_sampling.CONST, (0.1, 2 / 3)),  # ((1 - sigma) / sigma)^2: 81 and 0.25
    ],
)
def test_min_snr_caps_the_weight_of_little_noise(base, folder, monkeypatch, kind, sigma):
    """min(SNR, 5) on the clean picture, which is min(SNR, 5) / SNR on the noise: its error is SNR times as large."""
    objective, _, _ = objective_of(base, settings(folder, min_snr_gamma=5.0))
    sampling = type("Sampling", (comfy.model_sampling.ModelSamplingDiscrete, kind), {})()
    monkeypatch.setattr(objective, "sampling", sampling)
    torch.testing.assert_close(objective.weight(torch.tensor(sigma)), torch.tensor([5.0, 0.25]))


def test_dropped_subjects_are_nobody(base, folder):
    objective, _, samples = objective_of(base, settings(folder))
    nobody = [replace(sample, subject=False) for sample in samples]
    assert objective.features(samples).any() and not objective.features(nobody).any()


@pytest.mark.parametrize("how", FITS)
def test_crops_are_fitted_as_the_settings_say(base, folder, how):
    """As Encode Subject does, and each way otherwise."""
    objective, adapter, samples = objective_of(base, settings(folder, fit=how))
    crops = torch.cat([sample.crop for sample in samples])
    found = {each: encode(base.clip_vision, crops, None, each, adapter.config)[1] for each in FITS}
    assert [each for each in FITS if torch.equal(objective.features(samples), found[each])] == [how]


def test_latents_are_at_the_scale_of_sampling(base, folder):
    objective, _, [sample, *_] = objective_of(base, settings(folder))
    encoded = base.vae.encode(sample.picture[..., :3])
    assert torch.equal(objective.latent(sample).cpu(), base.model.model.process_latent_in(encoded).cpu())


def test_parentheses_of_a_caption_are_no_weights(base, folder, monkeypatch):
    objective, _, [sample, *_] = objective_of(base, settings(folder))
    seen = []
    tokenize = objective.clip.tokenize
    monkeypatch.setattr(objective.clip, "tokenize", lambda text: seen.append(tokenize(text)) or seen[-1])
    objective.text(replace(sample, caption=r"a <person> (left) of \(it\) at (12:30)"), torch.zeros(1, 4, 8, 8))
    words, weights = zip(*((token, weight) for token, weight, *_ in seen[0]["l"][0]), strict=True)
    assert set(weights) == {1.0}
    bracket = tokenize(r"\(")["l"][0][1][0]
    assert words.count(bracket) == 3


def test_a_checkpointed_projection_has_the_same_gradients(base, folder):
    adapter = make_adapter(settings(folder), base)
    features = torch.randn(2, 5, adapter.config.image_dim, device=base.model.load_device)
    found = []
    for checkpointing in (False, True):
        adapter.zero_grad()
        sum(x.square().sum() for pair in Projector(adapter, checkpointing)(features) for x in pair).backward()
        found.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
    assert len(found[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


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
