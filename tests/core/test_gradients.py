"""Gradients of the fast form are those of the equations: training and sampling share these functions."""

from dataclasses import replace

import pytest
import torch
from reference import nested_attention

from nested_attention.attention import NestedToken, personalize, text_attention

B, H, N, T, M, D = 2, 3, 5, 7, 6, 8
REGION = torch.tensor([[0.0, 1.0, 0.5, 1.0, 0.25]])
CASES = {
    "rescale": [{}],
    "off": [{"norm": "off"}],
    "clamp": [{"norm": "clamp", "norm_factor": 0.6}],
    "strength, weight, region": [{"strength": 0.7, "weight": 1.6, "region": REGION}],
    "two subjects, several columns": [{"columns": (0, 3)}, {"columns": (5,), "weight": 1.3, "norm": "off"}],
}


def problem():
    make = torch.Generator().manual_seed(0)
    shapes = [(B, H, N, D), (B, H, T, D), (B, H, T, D), *[(B, H, M, D)] * 4]
    return [torch.randn(shape, generator=make, dtype=torch.float64, requires_grad=True) for shape in shapes]


def tokens_of(case, leaves):
    pairs = [leaves[3:5], leaves[5:7]]
    return [NestedToken(**{"columns": (2,), **c}, keys=k, values=v) for c, (k, v) in zip(CASES[case], pairs)]  # noqa: B905


def fast(case, *leaves):
    text, lse = text_attention(*leaves[:3])
    return personalize(text.clone(), *leaves[:3], tokens_of(case, leaves), text, lse)


def slow(case, *leaves):
    tokens = tokens_of(case, leaves)
    rows = [[replace(t, keys=t.keys[i : i + 1], values=t.values[i : i + 1]) for t in tokens] for i in range(B)]
    return nested_attention(*leaves[:3], rows)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_equations(case):
    """Also those of queries, keys and values: in training they depend on the nested values of earlier layers."""
    leaves = problem()
    upstream = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for compute in (fast, slow):
        results.append(torch.autograd.grad(compute(case, *leaves), leaves, upstream, materialize_grads=True))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    leaves = [leaf.detach()[:1, :1, :3, :4].requires_grad_() for leaf in problem()]
    assert torch.autograd.gradcheck(lambda *x: fast("off", *x), leaves)
    assert torch.autograd.gradcheck(lambda *x: fast("rescale", *x), leaves)
