"""Measures on people and pets that were never trained on: is it the same one, doing what the prompt says?

Everything is trained on the same pairs for the same number of steps from the same seed. Scores are kept as JSON, so
that tables and plots can be made again without drawing anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import comfy.sample
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nested_attention.files import read_adapter, write_adapter, write_atomically
from nested_attention.host.adapters import load_adapter, subject_of
from nested_attention.host.apply import apply_subject
from nested_attention.host.base import Base
from nested_attention.host.images import features, fit

from . import animals, people, pictures, places
from .judge import Judge
from .pictures import SIDE, VIEWS
from .rivals import apply_decoupled
from .scenes import SMALL, STANDS, World, as_pixels, small, stand

STEPS, CFG, SAMPLER, SCHEDULER = 20, 3.5, "euler", "simple"
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
WITHOUT_STRENGTH = ("none", "told", "ceiling")
MAIN = ("identity", "retrieved", "prompt")
CANDIDATES = 50
DRAWN_BEFORE = 88  # of those held out, the first were measured on while the model was made
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


def cases(world: World, count: int, kinds: Sequence[str] = ("people",), photos: int = 1) -> list[Case]:
    """Nobody twice, and nobody by whom anything about the model was chosen; with more photos, the same cases otherwise.

    Raises ValueError where there are not so many.
    """
    untouched = {kind: world.casts[kind].held_out[DRAWN_BEFORE:] for kind in kinds}
    if count > min(map(len, untouched.values())):
        raise ValueError(f"{count} cases, but only {min(map(len, untouched.values()))} who were not drawn before.")
    found = []
    for i in range(count):
        rng, chance = Random(f"case {i}"), Random(f"photos of case {i}")
        numbers = {k: untouched[k][i] for k in kinds}
        seen = {
            k: [world.portrait(k, n, v, chance) for v in chance.sample(range(VIEWS), photos)]
            for k, n in numbers.items()
        }
        wanted = {k: ATTRIBUTES[k].draw_view(rng) for k in kinds}
        place = rng.choice(list(places.NAMES))
        phrases = [PHRASES[k].format(PLACEHOLDERS[k], **wanted[k]) for k in kinds]
        prompt = f"{' and '.join(phrases)} {places.NAMES[place]}".replace(" wearing a  ", " ")
        prompt = re.sub(r"\ba (?=[aeiou])", "an ", prompt)
        tensors = {k: torch.from_numpy(np.stack(v)) / 255 for k, v in seen.items()}
        found.append(Case(numbers, tensors, {**wanted, "scene": {"place": place}}, prompt, i))
    return found


PHRASES = {
    "people": "a {expression} {} wearing a {clothes color} {clothes}",
    "animals": "a {mood} {} wearing a {wear color} {wears}",
}
Scores = dict[str, list[float]]
"""By their names, those of each case."""

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
            bound = subject_of(adapter, see(base, case.photos[kind], adapter))
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
def score(world: World, judge: Judge, cases: Sequence[Case], drawn: Tensor) -> Scores:
    """Of each case, mean over its subjects: the part of the identity that is right, of what the prompt asks, and
    whether the right one is found among 50; and the attributes one by one, 'people hair color'.
    """
    seen, found = judge(drawn), []
    for i, case in enumerate(cases):
        truth = {k: {**world.casts[k].identities[n], **case.wanted[k]} for k, n in case.numbers.items()}
        truth["scene"] = case.wanted["scene"]
        scored = {**{k: (*shown(k, case), *ASKED[k]) for k in case.numbers}, "scene": ("place",)}
        right = {
            f"{k} {key}": float(judge.heads.options[k][key][seen[k][key][i].argmax()] == truth[k][key])
            for k, keys in scored.items()
            for key in keys
        }
        each = {k: np.mean([right[f"{k} {key}"] for key in shown(k, case)]) for k in case.numbers}
        asked = [right[f"{k} {key}"] for k in case.numbers for key in ASKED[k]]
        known = [retrieved(world, judge, k, {key: x[i] for key, x in seen[k].items()}, case) for k in case.numbers]
        means = {"identity": [*each.values()], "prompt": [*asked, right["scene place"]], "retrieved": known}
        row = {key: float(np.mean(values)) for key, values in means.items()}
        found.append(row | {f"identity of {k}": float(value) for k, value in each.items()} | right)
    keys = dict.fromkeys(key for row in found for key in row)
    return {key: [row[key] for row in found if key in row] for key in keys}


def shown(kind: str, case: Case) -> list[str]:
    """What of an identity can be seen: closed eyes have no color."""
    asleep = case.wanted[kind].get("mood") == "sleepy"
    return [key for key in ATTRIBUTES[kind].IDENTITY if not (asleep and key == "eyes")]


def retrieved(world: World, judge: Judge, kind: str, seen: dict[str, Tensor], case: Case) -> bool:
    """Whether none of the 49 others held out who are most alike fits better to what the judge sees."""
    members, number, keys = world.casts[kind].identities, case.numbers[kind], shown(kind, case)
    others = [n for n in world.casts[kind].held_out if n != number]
    others.sort(key=lambda n: sum(members[n][key] != members[number][key] for key in keys))
    values = judge.heads.options[kind]
    fits = [
        sum(seen[key][values[key].index(members[n][key])].item() for key in keys)
        for n in (number, *others[: CANDIDATES - 1])
    ]
    return fits[0] >= max(fits)


def as_asked(world: World, groups: Sequence[Sequence[Case]]) -> Tensor:
    """Pictures [B, 3, 64, 64] of the very people of each group, side by side, doing what their prompts ask: drawn by
    what drew the pictures of the training.
    """
    who = [(k, n, case) for group in groups for case in group for k, n in case.numbers.items()]
    jobs = [ATTRIBUTES[k].job(world.casts[k].identities[n], case.wanted[k]) for k, n, case in who]
    with TemporaryDirectory() as folder:
        cutouts = iter(np.array(pictures.render(jobs, Path(folder) / "asked.rgba")))
    drawn = []
    for group in groups:
        rng, kinds = Random(group[0].seed), tuple(k for case in group for k in case.numbers)
        placed = [(Image.fromarray(next(cutouts)), stand(kinds, i, rng)) for i in range(len(kinds))]
        drawn.append(small(world.compose(place_of(group[0]), placed, rng)))
    return as_pixels(drawn)


def without_lookup(path: Path, out: Path) -> Path:
    """The adapter with keys of zero: every place sees the mean of all nested values, so that nothing is looked up."""
    adapter = read_adapter(path)
    for layer in adapter.layers:
        torch.nn.init.zeros_(layer.to_k.weight)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(adapter, out, notes=adapter.notes)
    return out


def interval(values: Sequence[float], share: bool = False) -> tuple[float, float, float]:
    """Mean and its 95 % interval: by bootstrap over the cases, or Wilson's for a `share` of them."""
    x, rng = np.array(values), np.random.default_rng(0)
    if share:
        n, p, z = len(x), x.mean(), 1.96
        middle, half = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
        return float(p), float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))
    means = x[rng.integers(0, len(x), (2000, len(x)))].mean(1)
    return float(x.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def run(
    ways: Mapping[str, Callable[[float], Scores]],
    out: Path,
    made: Mapping[str, Any],
    strengths: Sequence[float] = STRENGTHS,
) -> None:
    """Draw and score all, way by way and strength by strength; what is in `out` already is not done again.

    made   what the scores depend on, and its settings: where `out` has been made with another, all is done anew
    """
    found = json.loads(out.read_text()) if out.exists() else {}
    if found.get("made") != made:
        found = {"made": made, "scores": {}}
    for name, scores_at in ways.items():
        for strength in (1.0,) if name in WITHOUT_STRENGTH else strengths:
            if str(strength) in found["scores"].setdefault(name, {}):
                continue
            found["scores"][name][str(strength)] = scores = scores_at(strength)
            write_atomically(out, lambda file: file.write(json.dumps(found).encode()))
            print(name, strength, {key: round(float(np.mean(scores[key])), 3) for key in MAIN}, flush=True)


def digest(*modules: torch.nn.Module) -> str:
    """Of their weights."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            found.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()[:16]
