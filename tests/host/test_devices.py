"""Models on another device than what comes with the conditioning, as on every GPU.

The device is torch's "meta": it computes shapes only, and like a GPU takes no tensor of another device.
"""

from __future__ import annotations

import comfy.ldm.modules.attention as attention
import pytest
import torch
from small_models import make_model

from nested_attention.host import KEY
from nested_attention.host.layers import cross_attention_sites
from nested_attention.host.rows import REGION_KEY
from nested_attention.host.run import AppliedSubject, Run, region_masks

HALF = torch.ones(1, 8, 8).tril()
CHOICES = {
    "plain": {},
    "region": {"region": HALF},
    "region and competition": {"region": HALF, "competition": 2.0},
    "token weight": {"token_weight": 1.5, "strength": 0.5},
}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_unet_is_elsewhere(choice, low_memory, person, other, monkeypatch):
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    patcher = make_model()
    subjects = [
        AppliedSubject(f"<{i}>", bound.subject.tokens, bound.adapter, low_memory=low_memory, **CHOICES[choice])
        for i, bound in enumerate((person, other))
    ]
    run, options = Run(patcher, subjects), {"transformer_options": {"sigmas": torch.ones(1)}}
    run.install(options)
    places = torch.zeros(2, 77, 2)
    places[0, 1], places[0, 3] = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0])
    regions = region_masks(subjects, torch.empty(2, 4, 8, 8))
    beside = {KEY: places} | ({} if regions is None else {REGION_KEY: regions.expand(2, -1, -1, -1)})

    model = patcher.model.to("meta")
    width = cross_attention_sites(model.diffusion_model)[0].context
    x, sigma, context = (torch.empty(shape, device="meta") for shape in ((2, 4, 8, 8), (2,), (2, 77, width)))
    given = (x, sigma, None, context, None, options["transformer_options"])
    out = run.apply_model(model._apply_model, *given, **beside, **pooled(model, x))
    assert out.shape == x.shape and out.device.type == "meta" and len(run.reached) == len(run.sites)


def pooled(model, x):
    """What the host's class of model is given beside the text."""
    width = model.adm_channels
    return {"y": torch.empty(len(x), width, device="meta")} if width else {}
