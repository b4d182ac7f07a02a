"""Measures on people and pets that were never trained on: is it the same one, doing what the prompt says?

Everything is trained on the same pairs for the same number of steps from the same seed. Scores are kept as JSON, so
that tables and plots can be made again without drawing anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import comfy.sample
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nested_attention.files import write_atomically
from nested_attention.host.adapters import BoundSubject, load_adapter, nested_tokens
from nested_attention.host.apply import apply_subject
from nested_attention.host.base import Base
from nested_attention.host.images import features, fit
from nested_attention.subject import Subject, join_photos

from . import animals, people, places
from .attributes import truth
from .judge import Judge
from .pictures import SIDE, VIEWS
from .rivals import apply_decoupled
from .scenes import SMALL, STANDS, World, as_pixels

STEPS, CFG, SAMPLER, SCHEDULER = 20, 3.5, "euler", "simple"
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
WITHOUT_STRENGTH = ("none", "told")
CANDIDATES = 50
AROUND, MARGIN = 44, 6  # pixels: side of what is around one of two people, and how far it may leave the picture
ATTRIBUTES = {"people": people, "animals": animals}
PLACEHOLDERS = {"people": "<person>", "animals": "<pet>"}
ASKED = {"people": people.VIEW, "animals": ("mood", "wears")}  # of what a prompt asks, what is scored


@dataclass(frozen=True)
class Case:
    """Who shall be drawn, by kind: held out, with photos [n, H, W, 3] in some views, and a prompt that asks for one."""

    numbers: dict[str, int]
    photos: dict[str, Tensor]
    wanted: dict[str, dict[str, str]]
    prompt: str
    seed: int


def cases(world: World, count: int, seed: int, kinds: Sequence[str] = ("people",), photos: int = 1) -> list[Case]:
    rng, found = Random(f"cases {seed}"), []
    for i in range(count):
        numbers = {k: world.casts[k].held_out()[i % len(world.casts[k].held_out())] for k in kinds}
        seen = {k: [world.portrait(k, n, v, rng) for v in rng.sample(range(VIEWS), photos)] for k, n in numbers.items()}
        wanted = {k: ATTRIBUTES[k].draw_view(rng) for k in kinds}
        place = rng.choice(list(places.NAMES))
        phrases = [PHRASES[k].format(PLACEHOLDERS[k], **wanted[k]) for k in kinds]
        prompt = f"{' and '.join(phrases)} {places.NAMES[place]}".replace(" wearing a  ", " ")
        prompt = re.sub(r"\ba (?=[aeiou])", "an ", prompt)
        tensors = {k: torch.from_numpy(np.stack(v)) / 255 for k, v in seen.items()}
        found.append(Case(numbers, tensors, {**wanted, "scene": {"place": place}}, prompt, 1000 * seed + i))
    return found


PHRASES = {
    "people": "a {expression} {} wearing a {clothes color} {clothes}",
    "animals": "a {mood} {} wearing a {wear color} {wears}",
}
Rows = list[dict[str, float]]
"""Scores of each case."""

Method = Callable[[Base, Case, float], tuple[Any, Any, str]]
"""Of a case and a strength: what to draw with, and the prompt for it."""


def nobody(base: Base, case: Case, strength: float) -> tuple[Any, Any, str]:
    """The base model, for which a placeholder is its class word."""
    return base.model, base.clip, case.prompt.replace("<", "").replace(">", "")


def told(world: World) -> Method:
    """The base model, and a prompt that tells in words all that is scored of somebody: the most that it can draw."""

    def method(base: Base, case: Case, strength: float) -> tuple[Any, Any, str]:
        prompt = case.prompt
        for kind, number in case.numbers.items():
            identity = world.casts[kind].identities[number]
            words = ATTRIBUTES[kind].describe(identity, Random(0), 1.0)
            noun = PLACEHOLDERS[kind].strip("<>")
            words += [identity["kind"], noun] if kind == "animals" else [noun]
            prompt = prompt.replace(PLACEHOLDERS[kind], " ".join(words))
        return base.model, base.clip, prompt

    return method


def nested(*paths: Path, choices: Mapping[str, Mapping[str, Any]] | None = None, **shared: Any) -> Method:
    """One adapter for each kind of a case, in their order; further choices of Apply Subject for all or by kind."""
    adapters = [load_adapter(str(path), path.parent.name) for path in paths]

    def method(base: Base, case: Case, strength: float) -> tuple[Any, Any, str]:
        model, clip, prompt = base.model, base.clip, case.prompt
        for adapter, kind in zip(adapters, case.numbers, strict=False):
            tokens = join_photos(nested_tokens(adapter, see(base, case.photos[kind], adapter)), "concatenate")
            bound = BoundSubject(Subject(tokens, adapter.fingerprint, adapter.name), adapter)
            own = {"placeholder": PLACEHOLDERS[kind], "strength": strength, **shared, **(choices or {}).get(kind, {})}
            model, clip = apply_subject(model, clip, bound, **own)
            prompt = prompt.replace(PLACEHOLDERS[kind], own["placeholder"])
        return model, clip, prompt

    return method


def decoupled(path: Path) -> Method:
    adapter = load_adapter(str(path), path.parent.name)

    def method(base: Base, case: Case, strength: float) -> tuple[Any, Any, str]:
        seen = see(base, case.photos["people"], adapter)
        model = apply_decoupled(base.model, adapter.patcher.model, seen, strength)
        return model, *nobody(base, case, strength)[1:]

    return method


def see(base: Base, photos: Tensor, adapter: Any) -> Tensor:
    return features(base.clip_vision, fit(photos, base.clip_vision.image_size, "center crop"), adapter.config)


@torch.inference_mode()
def draw(base: Base, method: Method, case: Case, strength: float = 1.0) -> Tensor:
    """A picture [3, 64, 64] in 0..1, by the host's sampler."""
    model, clip, prompt = method(base, case, strength)
    return sample(base, model, encode(clip, prompt), encode(clip, ""), case.seed)


def encode(clip: Any, text: str) -> list[Any]:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(base: Base, model: Any, positive: list[Any], negative: list[Any], seed: int) -> Tensor:
    """A picture [3, 64, 64]."""
    latent = torch.zeros(1, model.model.latent_format.latent_channels, 32, 32)
    settings = (STEPS, CFG, SAMPLER, SCHEDULER, positive, negative, latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    drawn = comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=seed)
    return base.vae.decode(drawn)[0].movedim(-1, 0).cpu()


@torch.inference_mode()
def draw_two(base: Base, ways: tuple[Method, Method], pair: tuple[Case, Case], strength: float = 1.0) -> Tensor:
    """Two people in one picture [3, 64, 64], by one prompt."""
    model, clip, left = ways[0](base, pair[0], strength)
    model, clip, right = ways[1](replace(base, model=model, clip=clip), pair[1], strength)
    prompt = f"{left.removesuffix(' ' + places.NAMES[place_of(pair[0])])} and {right}"
    return sample(base, model, encode(clip, prompt), encode(clip, ""), pair[0].seed)


def around_each(picture: Tensor) -> list[Tensor]:
    """Of a picture [3, 64, 64] of two, what is around each, enlarged to the size that the judge knows."""
    wide = F.pad(picture[None], (MARGIN, MARGIN, 0, 0), mode="replicate")
    lefts = [MARGIN + round(middle * SMALL / SIDE - AROUND / 2) for middle in STANDS["people", "people"][1]]
    parts = [wide[..., -AROUND:, left : left + AROUND] for left in lefts]
    return [F.interpolate(part, (SMALL, SMALL), mode="bilinear", antialias=True)[0] for part in parts]


def place_of(case: Case) -> str:
    return case.wanted["scene"]["place"]


def pairs_of(chosen: list[Case]) -> list[tuple[Case, Case]]:
    """Two and two in one place."""
    by_place = groupby(sorted(chosen, key=place_of), key=place_of)
    return [pair for _, here in by_place for pair in zip(*[here] * 2, strict=False)]


@torch.no_grad()
def score(world: World, judge: Judge, cases: Sequence[Case], pictures: Tensor) -> Rows:
    """For each case, mean over its subjects: the part of identity attributes that are right, of what the prompt asks,
    and whether the right one is found among 50.
    """
    seen, options, rows = judge(pictures), judge.heads.options, []
    for i, case in enumerate(cases):
        named = {k: {key: o[seen[k][key][i].argmax()] for key, o in options[k].items()} for k in options}
        of = {k: world.casts[k].identities[n] for k, n in case.numbers.items()}
        right = {k: np.mean([named[k][key] == of[k][key] for key in ATTRIBUTES[k].IDENTITY]) for k in of}
        asked = [named[k][key] == case.wanted[k][key] for k in of for key in ASKED[k]]
        asked.append(named["scene"]["place"] == case.wanted["scene"]["place"])
        found = [retrieved(world, judge, k, {key: x[i] for key, x in seen[k].items()}, case) for k in of]
        row = {"identity": right.values(), "prompt": asked, "retrieved": found}
        rows.append({key: float(np.mean(list(values))) for key, values in row.items()})
        rows[-1] |= {f"identity of {k}": float(value) for k, value in right.items()}
    return rows


def retrieved(world: World, judge: Judge, kind: str, seen: dict[str, Tensor], case: Case) -> bool:
    """Whether nobody of 49 others fits better to what the judge sees than who was asked for."""
    cast, number = world.casts[kind], case.numbers[kind]
    others = Random(f"candidates {case.seed}").sample([n for n in cast.held_out() if n != number], CANDIDATES - 1)
    values = judge.heads.options[kind]
    fit = [
        sum(seen[key][values[key].index(cast.identities[n][key])].item() for key in ATTRIBUTES[kind].IDENTITY)
        for n in (number, *others)
    ]
    return fit[0] >= max(fit)


def ceiling(world: World, judge: Judge, count: int, kinds: Sequence[str]) -> Rows:
    """The judge on rendered pictures of those held out, composed as the prompts ask."""
    rng = Random("ceiling")
    scenes = [world.scene(rng, held_out=True, kinds=tuple(kinds)) for _ in range(count)]
    made = [
        Case({f.kind: f.number for f in scene.figures}, {}, truth(world, scene), "", i)
        for i, scene in enumerate(scenes)
    ]
    return score(world, judge, made, as_pixels([scene.picture for scene in scenes]))


def ceiling_of_two(world: World, judge: Judge, count: int) -> Rows:
    """As `ceiling`, for each of two people in one picture."""
    rng = Random("ceiling")
    scenes = [world.scene(rng, held_out=True, kinds=("people", "people")) for _ in range(count)]
    made = [
        Case({"people": f.number}, {}, truth(world, replace(scene, figures=(f,))), "", i)
        for i, scene in enumerate(scenes)
        for f in scene.figures
    ]
    parts = [part for picture in as_pixels([s.picture for s in scenes]) for part in around_each(picture)]
    return score(world, judge, made, torch.stack(parts))


def interval(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    x, rng = np.array(values), np.random.default_rng(0)
    means = x[rng.integers(0, len(x), (draws, len(x)))].mean(1)
    return float(x.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def summary(rows: list[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    return {key: interval([row[key] for row in rows]) for key in rows[0]}


def run(
    ways: Mapping[str, Callable[[float], Rows]],
    real: Callable[[], Rows],
    out: Path,
    strengths: Sequence[float] = STRENGTHS,
) -> None:
    """Draw and score all, way by way and strength by strength; what is in `out` already is not done again.

    real   gives the rows of pictures that were not drawn by the model
    """
    found = json.loads(out.read_text()) if out.exists() else {}
    if "ceiling" not in found:
        found["ceiling"] = {"1.0": real()}
    for name, rows_at in ways.items():
        for strength in (1.0,) if name in WITHOUT_STRENGTH else strengths:
            if str(strength) in found.setdefault(name, {}):
                continue
            found[name][str(strength)] = rows_at(strength)
            write_atomically(out, lambda file: file.write(json.dumps(found).encode()))
            means = {k: round(v[0], 3) for k, v in summary(found[name][str(strength)]).items()}
            print(name, strength, means, flush=True)
