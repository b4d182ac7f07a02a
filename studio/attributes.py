"""What is true of people, animals and scenes, and heads that name it: for the encoders and the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import animals, people, places
from .scenes import Scene, World

ABSENT = -100  # in place of a value's number, where there is nobody to have one
Truth = Mapping[str, Mapping[str, str]]
"""Values of attributes, by kind: people, animals, scene."""


def vocabulary(kind: str) -> dict[str, list[str]]:
    """All values of each attribute of the people or the animals, as found in many of them, or of scenes."""
    if kind == "scene":
        return {"place": list(places.NAMES)}
    module, rng = {"people": people, "animals": animals}[kind], Random("vocabulary")
    drawn = [{**module.draw_identity(rng), **module.draw_view(rng)} for _ in range(3000)]
    return {key: sorted({d[key] for d in drawn}) for key in drawn[0]}


def truth(world: World, scene: Scene) -> Truth:
    """All that is true of a scene."""
    return {figure.kind: world.known(figure) for figure in scene.figures} | {"scene": {"place": scene.place}}


class Heads(nn.ModuleDict):
    """One linear layer for each attribute of these kinds, from states of this width."""

    def __init__(self, width: int, kinds: Sequence[str] = ("people", "animals", "scene")):
        super().__init__()
        self.options = {kind: vocabulary(kind) for kind in kinds}
        self.names = [(kind, key) for kind, found in self.options.items() for key in found]
        self.update({f"{k} {key}": nn.Linear(width, len(self.options[k][key])) for k, key in self.names})

    def targets(self, truths: Sequence[Truth]) -> Tensor:
        """Numbers of the values of all attributes [truths, heads]; ABSENT of those that a truth does not hold."""

        def number(truth: Truth, kind: str, key: str) -> int:
            value = truth.get(kind, {}).get(key)
            return ABSENT if value is None else self.options[kind][key].index(value)

        return torch.tensor([[number(truth, *name) for name in self.names] for truth in truths])

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, averaged over the heads; states [truths, width]. None of a head of which nothing is known."""
        pairs = zip(self.named(states), targets.T, strict=True)
        sums = [F.cross_entropy(seen, target, ignore_index=ABSENT, reduction="sum") for seen, target in pairs]
        return (torch.stack(sums) / (targets != ABSENT).sum(0).clamp(min=1)).mean()

    def named(self, states: Tensor) -> list[Tensor]:
        return [head(states) for head in self.children()]
