"""Factors on the rows of a weight in training: the weight is larger by them, and learns as much faster."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapter import NestedAdapter


class Gain(nn.Module):
    """A parametrization: the layer's weight is `gain` times what is trained.

    Adam takes steps of one size whatever the gradient. A weight that is enlarged once would learn by steps that are
    small for it; one that is a product learns in proportion.
    """

    def __init__(self, gain: Tensor):
        super().__init__()
        self.register_buffer("gain", gain)

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * weight


def add_gain(layer: nn.Module, rows: Tensor) -> None:
    """Multiply a linear layer's weight by factors [out_features], from now on."""
    parametrize.register_parametrization(layer, "weight", Gain(rows[:, None]))


def folded(adapter: NestedAdapter) -> NestedAdapter:
    """A copy with plain weights, the gains multiplied in, as adapter files hold them."""
    adapter = copy.deepcopy(adapter)
    for layer in adapter.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    return adapter
