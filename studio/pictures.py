"""All pictures that the small model learns from, rendered once: people, animals and places, each apart.

Scenes are put together from them (scenes.py), so that there are far more scenes than pictures.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from nested_attention.files import write_atomically

from . import animals, people, places

HERE = Path(__file__).parent
SIDE = 128  # of what is rendered
VIEWS = 4
IDENTITIES = {"people": 3200, "animals": 1800}
HELD_OUT = 200  # so many identities of each kind are never trained on: those photographed, and others by chance
PLACES = 60  # variants of each
PHOTOGRAPHED = {
    "people": {"studio_person": 3002, "studio_person_2": 3021},
    "animals": {"studio_pet": 1639},
}


@dataclass(frozen=True)
class Cast:
    """Identities of one kind, each in several views; pixels [identity, view, SIDE, SIDE, 4].

    held_out   the numbers of those who are never trained on
    """

    module: ModuleType
    identities: list[dict[str, str]]
    views: list[list[dict[str, str]]]
    pixels: np.ndarray
    held_out: Sequence[int]

    @cached_property
    def trained(self) -> list[int]:
        return sorted({*range(len(self.identities))} - {*self.held_out})


def render(jobs: list[dict[str, Any]], path: Path, side: int = SIDE) -> np.ndarray:
    """Draw jobs to a file of raw pixels, or map the one that is there; [jobs, side, side, 4]."""
    shape = (len(jobs), side, side, 4)
    if not path.exists():
        lines = "\n".join(json.dumps(job) for job in jobs).encode()
        command = {"args": ["node", "render.mjs", str(side)], "cwd": HERE, "input": lines}
        write_atomically(path, lambda out: subprocess.run(**command, stdout=out, check=True))
    return np.memmap(path, np.uint8, "r", shape=shape)


def cast(kind: str, work: Path) -> Cast:
    """The people or the animals. Distinct identities: nobody who is held out was trained on under another number."""
    module, count = {"people": people, "animals": animals}[kind], IDENTITIES[kind]
    rng = Random(f"{kind} 1")
    known: dict[str, dict[str, str]] = {}
    while len(known) < count:
        identity = module.draw_identity(rng)
        known.setdefault(json.dumps(identity), identity)
    identities = list(known.values())
    views = [[module.draw_view(rng) for _ in range(VIEWS)] for _ in identities]
    jobs = [module.job(identity, view) for identity, row in zip(identities, views, strict=True) for view in row]
    pixels = render(jobs, work / f"{kind}.rgba").reshape(count, VIEWS, SIDE, SIDE, 4)
    return Cast(module, identities, views, pixels, held_out(kind))


def held_out(kind: str) -> list[int]:
    """Those photographed first. Chance alone picks the others: the later ones were drawn, the rarer they are."""
    photographed = [*PHOTOGRAPHED[kind].values()]
    others = [number for number in range(IDENTITIES[kind]) if number not in photographed]
    return photographed + Random(f"held out {kind}").sample(others, HELD_OUT - len(photographed))


def backgrounds(work: Path) -> dict[str, np.ndarray]:
    """Pictures [variants, SIDE, SIDE, 3] of each place."""
    rng = Random("places 1")
    jobs = [places.job(name, rng) for name in places.NAMES for _ in range(PLACES)]
    pixels = render(jobs, work / "places.rgba").reshape(len(places.NAMES), PLACES, SIDE, SIDE, 4)
    return {name: pixels[i, ..., :3] for i, name in enumerate(places.NAMES)}


def photos(work: Path, assets: Path) -> None:
    """Photos of somebody who is never trained on, for the workflows: studio_person.png, studio_pet.png and more."""
    for kind, members in PHOTOGRAPHED.items():
        someone = cast(kind, work)
        for name, number in members.items():
            job = someone.module.job(someone.identities[number], someone.views[number][0])
            drawn = Image.fromarray(np.array(render([job], work / f"{name}.rgba", 256)[0]))
            photo = Image.new("RGB", drawn.size, "#f3f1ec")
            photo.paste(drawn, mask=drawn)
            photo.save(assets / f"{name}.png")
