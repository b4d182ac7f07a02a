"""What is compared: each method here is one table of docs/evidence.md, and keeps its scores in a file of `results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nested_attention.host.base import Base

from . import evidence
from .evidence import STRENGTHS, Method, Rows, cases, decoupled, nested, nobody, told
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

    count   cases for each row of a table
    """

    world: World
    base: Base
    judge: Judge
    results: Path
    docs: Path
    count: int

    def people(self, seed: int, files: Mapping[str, Path]) -> None:
        """One person, by each way to personalize, over strengths."""
        ways = {"nested": nested(files["person"]), "single": nested(files["single"])}
        ways |= {"decoupled": decoupled(files["decoupled"])}
        self.score("people", seed, self.plain | ways, PEOPLE)
        if seed == 0:
            shown = {f"nested {s:g}": (ways["nested"], s) for s in (0.5, 1.0, 1.5)}
            shown |= {"decoupled": (ways["decoupled"], 1.0), "single token": (ways["single"], 1.0)}
            self.show("people", shown, PEOPLE)

    def pets(self, pet: Path) -> None:
        self.score("pets", 0, {**self.plain, "nested": nested(pet)}, PETS, (1.0,))

    def pairs(self, person: Path, pet: Path) -> None:
        """A person and a pet, with and without what is offered against their mixing."""
        apart = {"choices": {"people": {"region": side(0.0, 0.58)}, "animals": {"region": side(0.54, 1.0)}}}
        settle = {"competition": 2.0}
        offered = {"as it is": {}, "competition 2": settle, "regions": apart, "both": apart | settle}
        ways = {name: nested(person, pet, **choices) for name, choices in offered.items()}
        self.score("pairs", 0, self.plain | ways, PEOPLE + PETS, (1.0,))
        self.show("pairs", {name: (way, 1.0) for name, way in ways.items()}, PEOPLE + PETS)

    def two_people(self, person: Path) -> None:
        """Two people by one adapter and one prompt, with and without what is offered against their mixing."""
        regions = {"region": side(0.0, 0.54)}, {"region": side(0.46, 1.0)}
        settle = {"competition": 2.0}
        offered = {"as it is": ({}, {}), "competition 2": (settle, settle), "regions": regions}
        ways = {name: (method, method) for name, method in self.plain.items()}
        for name, (left, right) in offered.items():
            ways[name] = nested(person, placeholder="<left>", **left), nested(person, placeholder="<right>", **right)
        pairs = evidence.pairs_of(cases(self.world, self.count, 0, PEOPLE))
        chosen = [case for pair in pairs for case in pair]

        def rows(way: tuple[Method, Method], strength: float) -> Rows:
            pictures = [evidence.draw_two(self.base, way, pair, strength) for pair in pairs]
            parts = [part for picture in pictures for part in evidence.around_each(picture)]
            return evidence.score(self.world, self.judge, chosen, torch.stack(parts))

        out = self.results / "two-people-seed-0.json"
        real = partial(evidence.ceiling_of_two, self.world, self.judge, 2 * len(chosen))
        evidence.run({name: partial(rows, way) for name, way in ways.items()}, real, out, (1.0,))
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
        self.score("training", 0, {name: nested(path) for name, path in files.items()}, PEOPLE, (1.0,))

    def drawing(self, person: Path) -> None:
        """One person, by one adapter that is applied in other ways."""
        ways = {name: nested(person, **choices) for name, choices in DRAWING.items()}
        self.score("drawing", 0, ways, PEOPLE, (1.0,))
        self.show("drawing", {name: (way, 1.0) for name, way in ways.items()}, PEOPLE)
        self.score("photos", 0, {"three photos": nested(person)}, PEOPLE, (1.0,), photos=3)

    @property
    def plain(self) -> dict[str, Method]:
        return {"none": nobody, "told": told(self.world)}

    def score(
        self,
        name: str,
        seed: int,
        ways: Mapping[str, Method],
        kinds: Sequence[str],
        strengths: Sequence[float] = (),
        photos: int = 1,
    ) -> None:
        chosen = cases(self.world, self.count, seed, kinds, photos)

        def rows(way: Method, strength: float) -> Rows:
            pictures = torch.stack([evidence.draw(self.base, way, case, strength) for case in chosen])
            return evidence.score(self.world, self.judge, chosen, pictures)

        out = self.results / f"{name}-seed-{seed}.json"
        real = partial(evidence.ceiling, self.world, self.judge, 4 * len(chosen), kinds)
        evidence.run({name: partial(rows, way) for name, way in ways.items()}, real, out, strengths or STRENGTHS)

    def show(self, name: str, ways: Mapping[str, tuple[Method, float]], kinds: Sequence[str]) -> None:
        every = {PLAIN[plain]: (way, 1.0) for plain, way in self.plain.items()} | dict(ways)
        shown = [
            (
                [photos[0] for photos in case.photos.values()],
                {name: evidence.draw(self.base, way, case, strength) for name, (way, strength) in every.items()},
            )
            for case in cases(self.world, SHOWN, 0, kinds)
        ]
        gallery(shown, self.docs / f"{name}.png")
