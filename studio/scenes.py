"""Scenes: somebody in a place, with a caption that tells some of it, and what is true of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from . import animals, people, places
from .pictures import SIDE, VIEWS, backgrounds, cast

SMALL = 64  # side of the scenes that the model learns to draw
STANDS = {  # who can be in a scene: the least and the largest side of each, and their middles
    ("people",): (((100, 118),), (64,)),
    ("animals",): (((100, 118),), (64,)),
    ("people", "animals"): (((86, 96), (66, 74)), (38, 93)),
    ("people", "people"): (((72, 78), (72, 78)), (33, 95)),
}
MOST = max(map(len, STANDS))  # figures of a scene


Box = tuple[int, int, int]
"""Left, top and side of a square of the picture."""


@dataclass(frozen=True)
class Figure:
    """Who stands in a scene, in which view, and where the picture of that is drawn."""

    kind: str
    number: int
    view: int
    box: Box


@dataclass(frozen=True)
class Scene:
    picture: np.ndarray  # [SMALL, SMALL, 3] uint8
    caption: str
    place: str
    figures: tuple[Figure, ...]


class World:
    """Makes scenes from the rendered pictures; which one is decided by the random numbers alone."""

    def __init__(self, work: Path):
        self.casts = {kind: cast(kind, work) for kind in ("people", "animals")}
        self.backgrounds = backgrounds(work)

    def scene(self, rng: Random, *, kinds: tuple[str, ...] | None = None, told: float = 0.3) -> Scene:
        """`told` is how often a caption tells each attribute of an identity."""
        kinds = kinds or rng.choice((("people",), ("people",), ("animals",), ("people", "animals")))
        figures = self.figures(kinds, rng)
        place = self.place(rng)
        picture = small(self.draw(place, figures, rng))
        return Scene(picture, self.caption(figures, place, rng, told), place, figures)

    def place(self, rng: Random) -> str:
        return places.draw_place(rng)

    def figures(self, kinds: tuple[str, ...], rng: Random) -> tuple[Figure, ...]:
        return tuple(self.figure(kind, i, kinds, rng) for i, kind in enumerate(kinds))

    def figure(self, kind: str, position: int, kinds: tuple[str, ...], rng: Random) -> Figure:
        number = rng.choice(self.casts[kind].trained)
        box = stand(kinds, position, rng)
        return Figure(kind, number, rng.randrange(VIEWS), box)

    def words(self, rng: Random) -> str:
        """A caption without its picture."""
        kinds = rng.choice((("people",), ("animals",)))
        return self.caption(self.figures(kinds, rng), self.place(rng), rng, 0.9)

    def draw(self, place: str, figures: tuple[Figure, ...], rng: Random) -> np.ndarray:
        return self.compose(place, [(self.cutout(figure), figure.box) for figure in figures], rng)

    def compose(self, place: str, cutouts: Iterable[tuple[Image.Image, Box]], rng: Random) -> np.ndarray:
        canvas = Image.fromarray(np.array(rng.choice(self.backgrounds[place])))
        for cutout, (left, top, side) in cutouts:
            picture = cutout.resize((side, side), Image.Resampling.LANCZOS)
            canvas.paste(picture, (left, top), picture)
        return np.asarray(canvas)

    def cutout(self, figure: Figure) -> Image.Image:
        return Image.fromarray(np.array(self.casts[figure.kind].pixels[figure.number, figure.view]))

    def portrait(self, kind: str, number: int, view: int, rng: Random) -> np.ndarray:
        """A photo of somebody to encode, [SIDE, SIDE, 3]: them alone, large, in front of some wall or place."""
        return self.draw(self.place(rng), (Figure(kind, number, view, (0, 0, SIDE)),), rng)

    def attributes(self, figure: Figure) -> tuple[dict[str, str], dict[str, str]]:
        members = self.casts[figure.kind]
        return members.identities[figure.number], members.views[figure.number][figure.view]

    def known(self, figure: Figure) -> dict[str, str]:
        """All that is true of somebody: who it is, and how they look in this view."""
        identity, view = self.attributes(figure)
        return {**identity, **view}

    def caption(self, figures: tuple[Figure, ...], place: str, rng: Random, told: float) -> str:
        phrases = [self.phrase(figure, rng, told) for figure in figures]
        where = f" {places.NAMES[place]}" if rng.random() < 0.9 else ""
        return re.sub(r"\ba (?=[aeiou])", "an ", " and ".join(phrases) + where)

    def phrase(self, figure: Figure, rng: Random, told: float) -> str:
        identity, view = self.attributes(figure)
        return (person_phrase if figure.kind == "people" else pet_phrase)(identity, view, rng, told)


def stand(kinds: tuple[str, ...], position: int, rng: Random) -> Box:
    sizes, middles = STANDS[kinds]
    side, middle = rng.randint(*sizes[position]), middles[position]
    return middle - side // 2 + rng.randint(-5, 5), SIDE - side, side


def small(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((SMALL, SMALL), Image.Resampling.BOX))


def person_phrase(identity: dict[str, str], view: dict[str, str], rng: Random, told: float) -> str:
    before, after = mood_phrases(view["expression"], rng)
    clothes = f" wearing a {view['clothes color']} {view['clothes']}" if rng.random() < 0.8 else ""
    return f"a {before}{with_noun(people.describe(identity, rng, told), 'person', rng)}{after}{clothes}"


def pet_phrase(identity: dict[str, str], view: dict[str, str], rng: Random, told: float) -> str:
    """The kind of animal is told as often as the rest of it: before 'pet' or in its place."""
    words = animals.describe(identity, rng, told)
    kind = rng.random() < max(told, 0.2)
    noun = identity["kind"] if kind and rng.random() < 0.5 else "pet"
    before, after = mood_phrases(view["mood"], rng)
    wears = f" wearing a {view['wear color']} {view['wears']}" if view["wears"] and rng.random() < 0.85 else ""
    words += [identity["kind"]] if kind and noun == "pet" else []
    return f"a {before}{with_noun(words, noun, rng)}{after}{wears}"


def mood_phrases(mood: str, rng: Random) -> tuple[str, str]:
    """What is told of a mood before and after the noun.

    Were it always before, the noun's token would come to hold it too, and a subject take it away in its place.
    """
    return rng.choice([(f"{mood} ", ""), (f"{mood} ", ""), ("", f" who is {mood}"), ("", f" who is {mood}"), ("", "")])


def with_noun(words: list[str], noun: str, rng: Random) -> str:
    """What is told of somebody, mostly before the noun.

    A text encoder sees only what is before a word. So the noun's token comes to hold what somebody looks like, and the
    UNet to look it up there: which is the place that a subject takes later.
    """
    if words and rng.random() < 0.25:
        return f"{noun} with {' and '.join(words)}"
    return " ".join([*words, noun])


def stacked(pictures: list[np.ndarray]) -> Tensor:
    """[H, W, 3] each to [B, 3, H, W], uint8."""
    return rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w")


def as_pixels(pictures: list[np.ndarray] | Tensor) -> Tensor:
    """uint8 [H, W, 3] each, or what `stacked` made of them, to 0..1 [B, 3, H, W]."""
    return (pictures if isinstance(pictures, Tensor) else stacked(pictures)).float() / 255
