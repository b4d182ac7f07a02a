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
from node_helpers import conditioning_set_values
from torch import Tensor

from nested_attention.files import write_atomically
from nested_attention.host.adapters import BoundSubject, load_adapter, nested_tokens
from nested_attention.host.apply import apply_subject
from nested_attention.host.base import Base
from nested_attention.host.images import features, fit
from nested_attention.subject import Subject, join_photos

from . import animals, people, places
from .judge import Judge, truth
from .pictures import VIEWS
from .rivals import apply_decoupled
from .scenes import World, as_pixels

STEPS, CFG, SAMPLER, SCHEDULER = 20, 3.5, "euler", "simple"
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
WITHOUT_STRENGTH = ("none", "told")
CANDIDATES = 50
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
        model, clip = base.model, base.clip
        for adapter, kind in zip(adapters, case.numbers, strict=False):
            tokens = join_photos(nested_tokens(adapter, see(base, case.photos[kind], adapter)), "concatenate")
            bound = BoundSubject(Subject(tokens, adapter.fingerprint, adapter.name), adapter)
            own = {"placeholder": PLACEHOLDERS[kind], "strength": strength, **shared, **(choices or {}).get(kind, {})}
            model, clip = apply_subject(model, clip, bound, **own)
        return model, clip, case.prompt

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


def sample(base: Base, model: Any, positive: list[Any], negative: list[Any], seed: int, width: int = 64) -> Tensor:
    """A picture [3, 64, width]."""
    latent = torch.zeros(1, model.model.latent_format.latent_channels, 32, width // 2)
    settings = (STEPS, CFG, SAMPLER, SCHEDULER, positive, negative, latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    drawn = comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=seed)
    return base.vae.decode(drawn)[0].movedim(-1, 0).cpu()


WIDTH = 0.6  # of a picture of two people, for each


@torch.inference_mode()
def draw_beside(base: Base, path: Path, pair: Sequence[Case], strength: float) -> list[Tensor]:
    """Two people by one adapter in a picture of 128 x 64, each with a prompt for an area; what lies around each."""
    model, clip, entries = base.model, base.clip, []
    for case, name in zip(pair, ("<left>", "<right>"), strict=True):
        method = nested(path, placeholder=name)
        model, clip, _ = method(replace(base, model=model, clip=clip), case, strength)
    for case, name, start in zip(pair, ("<left>", "<right>"), (0.0, 1 - WIDTH), strict=True):
        area = {"area": ("percentage", 1.0, WIDTH, 0.0, start), "strength": 1.0}
        entries += conditioning_set_values(encode(clip, case.prompt.replace("<person>", name)), area)
    picture = sample(base, model, entries, encode(clip, ""), pair[0].seed, 128)
    middles = (round(64 * WIDTH), 128 - round(64 * WIDTH))
    return [picture[..., middle - 32 : middle + 32] for middle in middles]


def place_of(case: Case) -> str:
    return case.wanted["scene"]["place"]


def beside(world: World, base: Base, judge: Judge, path: Path, count: int, out: Path) -> None:
    """Scores of two people of one class in one picture, with their photos and without; they share the place."""
    if out.exists():
        return
    by_place = groupby(sorted(cases(world, count, 0), key=place_of), key=place_of)
    pairs = [pair for _, here in by_place for pair in zip(*[here] * 2, strict=False)]
    chosen, found = [case for pair in pairs for case in pair], {}
    for name, strength in (("none", 0.0), ("nested", 1.0)):
        pictures = [picture for pair in pairs for picture in draw_beside(base, path, pair, strength)]
        found[name] = {"1.0": score(world, judge, chosen, torch.stack(pictures))}
        print("beside", name, {k: round(v[0], 3) for k, v in summary(found[name]["1.0"]).items()}, flush=True)
    write_atomically(out, lambda file: file.write(json.dumps(found).encode()))


@torch.no_grad()
def score(world: World, judge: Judge, cases: list[Case], pictures: Tensor) -> list[dict[str, float]]:
    """For each case, mean over its subjects: the part of identity attributes that are right, of what the prompt asks,
    and whether the right one is found among 50.
    """
    seen, rows = judge(pictures), []
    for i, case in enumerate(cases):
        named = {k: {key: o[seen[k][key][i].argmax()] for key, o in judge.values[k].items()} for k in judge.values}
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
    values = judge.values[kind]
    fit = [
        sum(seen[key][values[key].index(cast.identities[n][key])].item() for key in ATTRIBUTES[kind].IDENTITY)
        for n in (number, *others)
    ]
    return fit[0] >= max(fit)


def ceiling(world: World, judge: Judge, count: int, kinds: Sequence[str]) -> list[dict[str, float]]:
    """The judge on rendered pictures of those held out, composed as the prompts ask."""
    rng = Random("ceiling")
    scenes = [world.scene(rng, held_out=True, kinds=tuple(kinds)) for _ in range(count)]
    made = [
        Case({f.kind: f.number for f in scene.figures}, {}, truth(world, scene), "", i)
        for i, scene in enumerate(scenes)
    ]
    return score(world, judge, made, as_pixels([scene.picture for scene in scenes]))


def interval(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    x, rng = np.array(values), np.random.default_rng(0)
    means = x[rng.integers(0, len(x), (draws, len(x)))].mean(1)
    return float(x.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def summary(rows: list[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    return {key: interval([row[key] for row in rows]) for key in rows[0]}


def run(
    world: World,
    base: Base,
    judge: Judge,
    methods: Mapping[str, Method],
    chosen: list[Case],
    out: Path,
    strengths: Sequence[float] = STRENGTHS,
) -> None:
    """Draw and score all, method by method and strength by strength; what is in `out` already is not done again."""
    found = json.loads(out.read_text()) if out.exists() else {}
    if "ceiling" not in found:
        found["ceiling"] = {"1.0": ceiling(world, judge, 4 * len(chosen), list(chosen[0].numbers))}
    for name, method in methods.items():
        for strength in (1.0,) if name in WITHOUT_STRENGTH else strengths:
            if str(strength) in found.setdefault(name, {}):
                continue
            pictures = torch.stack([draw(base, method, case, strength) for case in chosen])
            found[name][str(strength)] = score(world, judge, chosen, pictures)
            write_atomically(out, lambda file: file.write(json.dumps(found).encode()))
            means = {k: round(v[0], 3) for k, v in summary(found[name][str(strength)]).items()}
            print(name, strength, means, flush=True)
