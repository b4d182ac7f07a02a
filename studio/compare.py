"""What is compared: each method here is one table of docs/evidence.md, and keeps its scores in a file of `results`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nested_attention.files import read_adapter
from nested_attention.host.base import Base
from nested_attention.host.train import ADAPTER

from . import evidence
from .evidence import STRENGTHS, Case, Method, Scores, cases, decoupled, nested, nobody, told
from .gallery import gallery
from .judge import Judge
from .scenes import World

PEOPLE, PETS = ("people",), ("animals",)
DRAWING = {
    "as it is": {},
    "token weight 1.5": {"token_weight": 1.5},
    "token weight 2": {"token_weight": 2.0},
    "from 10 % of the steps on": {"start_percent": 0.1},
    "from 20 % of the steps on": {"start_percent": 0.2},
    "until 50 % of the steps": {"end_percent": 0.5},
}
PLAIN = {"none": "no subject", "told": "told in words"}  # their names in a gallery
SHOWN = 6  # cases of a gallery


def side(left: float, right: float) -> Tensor:
    """A mask [1, H, W] of the part of a picture between two places, 0 to 1 from its left."""
    across = (torch.arange(64) + 0.5) / 64
    return ((across > left) & (across < right)).float().expand(1, 64, 64)


@dataclass(frozen=True)
class Comparison:
    """Scores go to `results`, galleries to `docs`.

    count     cases of a table, the same ones in all its rows
    lengths   of the trainings that come before the adapters', kept with the scores
    """

    world: World
    base: Base
    judge: Judge
    results: Path
    docs: Path
    count: int
    lengths: Mapping[str, Any] = field(default_factory=dict)

    def people(self, seed: int, files: Mapping[str, Path]) -> None:
        """One person, by each way to personalize, trained from this seed, over strengths."""
        person, other, single = (files[way] for way in ("person", "decoupled", "single"))
        ways = {"nested": nested(person), "decoupled": decoupled(other), "single": nested(single)}
        self.score("people", self.plain | ways if seed == 0 else ways, PEOPLE, (person, other, single), seed=seed)
        if seed == 0:
            shown = {f"nested {s:g}": (ways["nested"], s) for s in (0.5, 1.0, 1.5)}
            shown |= {"decoupled": (ways["decoupled"], 1.0), "single token": (ways["single"], 1.0)}
            self.show("people", shown, PEOPLE)

    def pets(self, pet: Path) -> None:
        self.score("pets", {**self.plain, "nested": nested(pet)}, PETS, (pet,), (1.0,))

    def pairs(self, person: Path, pet: Path) -> None:
        """A person and a pet, with and without what is offered against their mixing."""
        apart = {"choices": {"people": {"region": side(0.0, 0.58)}, "animals": {"region": side(0.54, 1.0)}}}
        settle = {"competition": 2.0}
        offered = {"as it is": {}, "competition 2": settle, "regions": apart, "both": apart | settle}
        ways = {name: nested(person, pet, **choices) for name, choices in offered.items()}
        self.score("pairs", self.plain | ways, PEOPLE + PETS, (person, pet), (1.0,))
        self.show("pairs", {name: (way, 1.0) for name, way in ways.items()}, PEOPLE + PETS)

    def two_people(self, person: Path) -> None:
        """Two people by one adapter and one prompt, with and without what is offered against their mixing."""
        regions = {"region": side(0.0, 0.54)}, {"region": side(0.46, 1.0)}
        settle = {"competition": 2.0}
        offered = {"as it is": ({}, {}), "competition 2": (settle, settle), "regions": regions}
        ways = {name: (method, method) for name, method in self.plain.items()}
        for name, (left, right) in offered.items():
            ways[name] = nested(person, placeholder="<left>", **left), nested(person, placeholder="<right>", **right)
        pairs = evidence.pairs_of(cases(self.world, self.count, PEOPLE))

        def scores(pictures: Iterable[Tensor]) -> Scores:
            """Of a pair, the mean of the two."""
            sides = zip(*map(evidence.around_each, pictures), strict=True)
            each = [
                evidence.score(self.world, self.judge, cases, torch.stack(seen))
                for cases, seen in zip(zip(*pairs, strict=True), sides, strict=True)
            ]
            return {key: np.mean([found[key] for found in each], axis=0).tolist() for key in each[0]}

        self.measure("two-people", ways, pairs, partial(evidence.draw_two, self.base), scores, (person,), (1.0,))
        shown = [
            (
                [case.photos["people"][0] for case in pair],
                {PLAIN.get(name, name): evidence.draw_two(self.base, way, pair) for name, way in ways.items()},
            )
            for pair in pairs[:SHOWN]
        ]
        gallery(shown, self.docs / "two_people.png")

    def training(self, files: Mapping[str, Path]) -> None:
        """One person, by adapters that were trained in other ways."""
        ways = {name: nested(path) for name, path in files.items()}
        self.score("training", ways, PEOPLE, tuple(files.values()), (1.0,))

    def drawing(self, person: Path, alike: Path) -> None:
        """One person, by one adapter that is applied in other ways; `alike` is that without its lookup."""
        ways = {name: nested(person, **choices) for name, choices in DRAWING.items()}
        ways["all places alike"] = nested(alike)
        self.score("drawing", ways, PEOPLE, (person, alike), (1.0,))
        self.show("drawing", {name: (way, 1.0) for name, way in ways.items()}, PEOPLE)
        self.score("drawing", {"three photos": nested(person)}, PEOPLE, (person, alike), (1.0,), photos=3)

    @property
    def plain(self) -> dict[str, Method]:
        return {"none": nobody, "told": told(self.world)}

    @cached_property
    def made(self) -> dict[str, Any]:
        base = self.base.model.model.diffusion_model, self.base.clip.cond_stage_model, self.base.clip_vision.model
        digests = {"base": evidence.digest(*base), "judge": evidence.digest(self.judge)}
        return {**digests, "cases": self.count, "lengths": self.lengths}

    def score(
        self,
        name: str,
        ways: Mapping[str, Method],
        kinds: Sequence[str],
        adapters: Sequence[Path] = (),
        strengths: Sequence[float] = (),
        photos: int = 1,
        seed: int = 0,
    ) -> None:
        """One of each kind in each picture."""
        chosen = cases(self.world, self.count, kinds, photos)

        def scores(pictures: Iterable[Tensor]) -> Scores:
            return evidence.score(self.world, self.judge, chosen, torch.stack([*pictures]))

        def draw(way: Method, case: tuple[Case], strength: float) -> Tensor:
            return evidence.draw(self.base, way, *case, strength)

        self.measure(name, ways, [(case,) for case in chosen], draw, scores, adapters, strengths or STRENGTHS, seed)

    def measure(
        self,
        name: str,
        ways: Mapping[str, Any],
        groups: Sequence[Sequence[Case]],
        draw: Callable[[Any, Any, float], Tensor],
        scores_of: Callable[[Iterable[Tensor]], Scores],
        adapters: Sequence[Path],
        strengths: Sequence[float],
        seed: int = 0,
    ) -> None:
        """Scores of what `draw` draws of each group of cases in each way; and where a way is to draw nobody, of
        pictures that no model drew.
        """

        def scores(way: Any, strength: float) -> Scores:
            return scores_of([draw(way, group, strength) for group in groups])

        ready = {name: partial(scores, way) for name, way in ways.items()}
        if "none" in ways:
            ready["ceiling"] = lambda strength: scores_of(evidence.as_asked(self.world, groups))
        names = [path.parent.name if path.name == ADAPTER else path.stem for path in adapters]
        made = self.made | {"adapters": dict(zip(names, map(record, adapters), strict=True))}
        evidence.run(ready, self.results / f"{name}-seed-{seed}.json", made, strengths)

    def show(self, name: str, ways: Mapping[str, tuple[Method, float]], kinds: Sequence[str]) -> None:
        every = {PLAIN[plain]: (way, 1.0) for plain, way in self.plain.items()} | dict(ways)
        shown = [
            (
                [photos[0] for photos in case.photos.values()],
                {name: evidence.draw(self.base, way, case, strength) for name, (way, strength) in every.items()},
            )
            for case in cases(self.world, SHOWN, kinds)
        ]
        gallery(shown, self.docs / f"{name}.png")


def record(adapter: Path) -> dict[str, Any]:
    """Its weights by their digest, and how they were trained."""
    read = read_adapter(adapter)
    return {"weights": evidence.digest(read), **json.loads(read.notes.get("training", "{}"))}
