"""The Q-Former against the equations of a Perceiver resampler, written out one head at a time."""

import torch
import torch.nn.functional as F

from nested_attention.resampler import Resampler

SHAPE = {"image_dim": 10, "dim": 12, "depth": 2, "heads": 3, "dim_head": 4, "queries": 5, "output_dim": 7, "ff_mult": 4}


def reference(resampler, image):
    """One photo [I, image_dim]; also the attention of each layer over the image, [H, Q, I]."""
    w = {name: p.detach() for name, p in resampler.named_parameters()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    x, latents, maps = linear(image, "proj_in"), w["latents"][0], []
    for i in range(SHAPE["depth"]):
        at = f"layers.{i}"
        queries, both = norm(latents, f"{at}.0.norm2"), norm(x, f"{at}.0.norm1")
        both = torch.cat([both, queries])
        q, kv = linear(queries, f"{at}.0.to_q"), linear(both, f"{at}.0.to_kv")
        heads, probabilities = [], []
        for h in range(SHAPE["heads"]):
            part = slice(4 * h, 4 * h + 4)
            p = (q[:, part] @ kv[:, :12][:, part].T / 2).softmax(-1)
            heads.append(p @ kv[:, 12:][:, part])
            probabilities.append(p[:, : len(image)])
        latents = latents + linear(torch.cat(heads, dim=-1), f"{at}.0.to_out")
        latents = latents + linear(F.gelu(linear(norm(latents, f"{at}.1.0"), f"{at}.1.1")), f"{at}.1.3")
        maps.append(torch.stack(probabilities))
    return norm(linear(latents, "proj_out"), "norm_out"), maps


def test_equals_the_reference():
    resampler = Resampler(**SHAPE).double()
    image = torch.randn(2, 6, SHAPE["image_dim"], dtype=torch.float64)
    maps = []
    out = resampler(image, observe=maps.append)
    assert out.shape == (2, SHAPE["queries"], SHAPE["output_dim"])
    for i in range(2):
        expected, expected_maps = reference(resampler, image[i])
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close([m[i] for m in maps], expected_maps)


def test_observing_changes_nothing():
    resampler = Resampler(**SHAPE)
    image = torch.randn(1, 6, SHAPE["image_dim"])
    assert torch.equal(resampler(image), resampler(image, observe=lambda attention: None))
