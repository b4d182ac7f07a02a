"""Sampling through ComfyUI's own guiders, and what it should give, written out from the equations."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from equations import expected_model

from nested_attention.host import KEY
from nested_attention.host.marks import unsigned

PROMPT = "a <person> in a park"  # the start token is column 0, so the subject stands at 2
PLAIN = "a person in a park"
SIGMAS = torch.tensor([4.0, 1.0, 0.0])


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def bare_encode(clip, text):
    """As nodes do that keep nothing but the states."""
    states, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return [[states, {"pooled_output": pooled}]]


def noise(batch=1, size=(4, 4), seed=7):
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))


def guide(model, positive, negative, cfg=3.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def run(guider, latent=None, sigmas=SIGMAS):
    latent = noise() if latent is None else latent
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(latent, torch.zeros_like(latent), sampler, sigmas, seed=1)


def sample(model, positive, negative, cfg=3.0, **kwargs):
    return run(guide(model, positive, negative, cfg), **kwargs)


def text_of(conditioning):
    return conditioning[0][0][0]


def same_text(a, b):
    """Bit for bit, once the signatures of subjects are out."""
    return torch.equal(*(unsigned(states, added.get(KEY, []), {}) for [[states, added]] in (a, b)))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3 * b.abs().max().item())


def check(model, base_model, sites, texts, positive, negative, **kwargs):
    """Sampling with the model equals sampling with the equations."""
    actual = sample(model, positive, negative, **kwargs)
    close(actual, sample(expected_model(base_model, sites, texts), positive, negative, **kwargs))
    return actual


def count_calls(model):
    """Batch sizes of the UNet calls of the sampling to come."""
    sizes = []

    def count(executor, x, *args, **kwargs):
        sizes.append(len(x))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key("apply_model", "count", count)
    return sizes
