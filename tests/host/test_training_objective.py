"""The loss of training: its forward is sampling's, its gradients are the equations', its inputs what sampling gives."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from equations import Stands, expected_model
from reference import nested_attention
from sampling import guide, noise
from small_training import bind, exact, make_base, make_data, make_reader, samples_of, settings

from nested_attention.crop import FITS
from nested_attention.files import write_adapter
from nested_attention.host import patch
from nested_attention.host.adapters import load_adapter
from nested_attention.host.apply import apply_subject
from nested_attention.host.base import checkpointed
from nested_attention.host.images import encode
from nested_attention.host.objective import DiffusionObjective, told_sizes
from nested_attention.host.train import make_adapter
from nested_attention.training.config import TrainingError
from nested_attention.training.entries import read_dataset
from nested_attention.training.samples import Row, Sample
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
