"""Measures on people who were never trained on: is it the same person, and does the picture do what the prompt says?

Everything is trained on the same pairs for the same number of steps from the same seed. Scores are kept as JSON, so
that tables and plots can be made again without drawing anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import comfy.sample
import numpy as np
import torch
from torch import Tensor

from nested_attention.host.adapters import BoundSubject, load_adapter, nested_tokens
from nested_attention.host.apply import apply_subject
from nested_attention.host.base import Base
from nested_attention.host.images import features, fit
from nested_attention.subject import Subject

from . import people, places
from .judge import Judge, truth
from .pictures import VIEWS
from .rivals import apply_decoupled
from .scenes import World, as_pixels

STEPS, CFG, SAMPLER, SCHEDULER = 20, 3.5, "euler", "simple"
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5)
CANDIDATES = 50
PROMPT_KEYS = ("expression", "clothes", "clothes color")


@dataclass(frozen=True)
class Case:
    """Somebody held out, a photo of them [1, H, W, 3] in one view, and a prompt that asks for another."""

    number: int
    photo: Tensor
    wanted: dict[str, str]
    prompt: str
    seed: int


def cases(world: World, count: int, seed: int) -> list[Case]:
    cast, rng = world.casts["people"], Random(f"cases {seed}")
    found = []
    for i in range(count):
        number = cast.held_out()[i % len(cast.held_out())]
        photo = world.portrait("people", number, rng.randrange(VIEWS), rng)
        wanted = {**people.draw_view(rng), "place": rng.choice(list(places.NAMES))}
        prompt = "a {expression} <person> wearing a {clothes color} {clothes} ".format(**wanted)
        prompt += places.NAMES[wanted["place"]]
        found.append(Case(number, torch.from_numpy(photo.copy())[None] / 255, wanted, prompt, 1000 * seed + i))
    return found


Method = Callable[[Base, Case, float], tuple[Any, Any]]


def nobody(base: Base, case: Case, strength: float) -> tuple[Any, Any]:
    """The base model, for which the placeholder is its class word."""
    return base.model, base.clip


def nested(path: Path, **choices: Any) -> Method:
    adapter = load_adapter(str(path), path.stem)

    def method(base: Base, case: Case, strength: float) -> tuple[Any, Any]:
        tokens = nested_tokens(adapter, see(base, case, adapter))
        bound = BoundSubject(Subject(tokens, adapter.fingerprint, adapter.name), adapter)
        return apply_subject(base.model, base.clip, bound, placeholder="<person>", strength=strength, **choices)

    return method


def decoupled(path: Path) -> Method:
    adapter = load_adapter(str(path), path.stem)

    def method(base: Base, case: Case, strength: float) -> tuple[Any, Any]:
        return apply_decoupled(base.model, adapter.patcher.model, see(base, case, adapter), strength), base.clip

    return method


def see(base: Base, case: Case, adapter: Any) -> Tensor:
    return features(base.clip_vision, fit(case.photo, base.clip_vision.image_size, "center crop"), adapter.config)


@torch.inference_mode()
def draw(base: Base, method: Method, case: Case, strength: float = 1.0) -> Tensor:
    """A picture [3, 64, 64] in 0..1, by the host's sampler."""
    model, clip = method(base, case, strength)
    prompt = case.prompt if clip is not base.clip else case.prompt.replace("<person>", "person")
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, ""))
    latent = torch.zeros(1, model.model.latent_format.latent_channels, 32, 32)
    settings = (STEPS, CFG, SAMPLER, SCHEDULER, positive, negative, latent)
    noise = comfy.sample.prepare_noise(latent, case.seed)
    drawn = comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=case.seed)
    return base.vae.decode(drawn)[0].movedim(-1, 0).cpu()


@torch.no_grad()
def score(world: World, judge: Judge, cases: list[Case], pictures: Tensor) -> list[dict[str, float]]:
    """For each case what is right, 0 or 1: identity attributes (mean), what the prompt asked (mean), found among 50."""
    cast = world.casts["people"]
    seen = judge(pictures)
    rows = []
    for i, case in enumerate(cases):
        named = {key: options[seen["people"][key][i].argmax()] for key, options in judge.values["people"].items()}
        place = judge.values["scene"]["place"][seen["scene"]["place"][i].argmax()]
        identity = cast.identities[case.number]
        rng = Random(f"candidates {case.seed}")
        others = rng.sample([n for n in cast.held_out() if n != case.number], CANDIDATES - 1)
        likely = [likelihood(judge, seen["people"], i, cast.identities[n]) for n in (case.number, *others)]
        right = [named[key] == case.wanted[key] for key in PROMPT_KEYS] + [place == case.wanted["place"]]
        rows.append(
            {
                "identity": float(np.mean([named[key] == identity[key] for key in people.IDENTITY])),
                "prompt": float(np.mean(right)),
                "retrieved": float(likely[0] >= max(likely)),
            }
        )
    return rows


def likelihood(judge: Judge, seen: dict[str, Tensor], row: int, identity: dict[str, str]) -> float:
    values = judge.values["people"]
    return sum(seen[key][row, values[key].index(identity[key])].item() for key in people.IDENTITY)


def ceiling(world: World, judge: Judge, count: int) -> list[dict[str, float]]:
    """The judge on real pictures of people held out, composed as the prompts ask."""
    rng = Random("ceiling")
    scenes = [world.scene(rng, held_out=True, kinds=("people",)) for _ in range(count)]
    truths = [truth(world, scene) for scene in scenes]
    made = [
        Case(s.figures[0].number, torch.empty(0), {**t["people"], **t["scene"]}, "", i)
        for i, (s, t) in enumerate(zip(scenes, truths, strict=True))
    ]
    return score(world, judge, made, as_pixels([scene.picture for scene in scenes]))


def interval(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    x, rng = np.array(values), np.random.default_rng(0)
    means = x[rng.integers(0, len(x), (draws, len(x)))].mean(1)
    return float(x.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def summary(rows: list[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    return {key: interval([row[key] for row in rows]) for key in rows[0]}


def run(world: World, base: Base, judge: Judge, methods: dict[str, Method], count: int, seed: int, out: Path) -> None:
    """Draw and score all, method by method and strength by strength; what is in `out` already is not done again."""
    found = json.loads(out.read_text()) if out.exists() else {}
    chosen = cases(world, count, seed)
    found.setdefault("ceiling", {"1.0": ceiling(world, judge, 4 * count)})
    for name, method in methods.items():
        for strength in (1.0,) if name == "none" else STRENGTHS:
            if str(strength) in found.setdefault(name, {}):
                continue
            pictures = torch.stack([draw(base, method, case, strength) for case in chosen])
            found[name][str(strength)] = score(world, judge, chosen, pictures)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found))
            means = {k: round(v[0], 3) for k, v in summary(found[name][str(strength)]).items()}
            print(name, strength, means, flush=True)
