"""What is compared gives the same results. Benchmarks check that at full size; here it is small."""

import sys
from pathlib import Path

import torch


def test_all_ways_through_a_layer_agree(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *sys.path])
    from benchmarks.attention import VARIANTS, Case, check, make_problem

    case = Case(queries=64, heads=2, nested=4, subjects=2, uncond=True)
    check(make_problem(case, torch.device("cpu"), torch.float32), list(VARIANTS))
