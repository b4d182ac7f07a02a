"""Backgrounds, drawn here: plain walls and a few places, each different every time."""

from __future__ import annotations

from random import Random
from typing import Any

WALLS = {"red": "#d65a56", "blue": "#5c8fd6", "green": "#6bb36e", "yellow": "#f1d264", "purple": "#9a74c9",
         "white": "#f3f1ec", "grey": "#a3a7ad", "orange": "#ec9a4f"}  # fmt: skip
PLACES = ("beach", "forest", "snow", "night", "city", "desert")
NAMES = {**{f"{color} wall": f"in front of a {color} wall" for color in WALLS}, "beach": "on the beach",
         "forest": "in the forest", "snow": "in the snow", "night": "at night", "city": "in the city",
         "desert": "in the desert"}  # fmt: skip


def draw_place(rng: Random) -> str:
    """Half of all pictures show a wall, half a place."""
    return rng.choice(PLACES) if rng.random() < 0.5 else f"{rng.choice(list(WALLS))} wall"


def job(name: str, rng: Random) -> dict[str, Any]:
    shapes = place(name, rng) if name in PLACES else wall(WALLS[name.removesuffix(" wall")])
    return {"svg": f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{shapes}</svg>'}


def box(color: str, top: float, bottom: float = 128) -> str:
    return f'<rect x="0" y="{top}" width="128" height="{bottom - top}" fill="{color}"/>'


def circle(x: float, y: float, radius: float, color: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{color}"/>'


def wall(color: str) -> str:
    return box(color, 0)


def place(name: str, rng: Random) -> str:
    x, y = rng.uniform(15, 113), rng.uniform(12, 30)
    line = rng.uniform(66, 86)
    spots = [rng.uniform(0, 128) for _ in range(8)]
    if name == "beach":
        return box("#8fd3f2", 0) + circle(x, y, 11, "#ffe27a") + box("#2f8fc4", line - 16) + box("#f0dba2", line)
    if name == "forest":
        trees = "".join(
            f'<path d="M{s - 17} {line + 8}L{s} {line - 62}L{s + 17} {line + 8}z" fill="{c}"/>'
            for s, c in zip(spots, ("#2f6b3c", "#3c8049") * 4, strict=True)
        )
        return box("#bfe3c8", 0) + trees + box("#5a8f45", line)
    if name == "snow":
        ridge = f"M-10 {line + 6}L{x - 10} {line - 48}L{x + 34} {line}L{x + 70} {line - 34}L150 {line + 6}z"
        hills = f'<path d="{ridge}" fill="#a9bccf"/>'
        flakes = "".join(circle(s, spots[i - 1] * 0.6, 2, "#ffffff") for i, s in enumerate(spots))
        return box("#cfe1f0", 0) + hills + box("#ffffff", line) + flakes
    if name == "night":
        stars = "".join(circle(s, spots[i - 1] * 0.55, 1.3, "#fff7c9") for i, s in enumerate(spots))
        return (
            box("#1b2350", 0)
            + stars
            + circle(x, y, 10, "#f6f0c4")
            + circle(x + 5, y - 3, 9, "#1b2350")
            + box("#0f1430", line + 12)
        )
    if name == "city":
        houses = "".join(
            f'<rect x="{i * 18 - 6}" y="{line - 25 - s * 0.3}" width="16" height="90" fill="{c}"/>'
            for i, (s, c) in enumerate(zip(spots, ("#7a8296", "#94809a", "#6b7f8f", "#a08c84") * 2, strict=True))
        )
        return box("#f2cfae", 0) + houses + box("#5b5f68", line + 16)
    dunes = f'<path d="M-5 {line}Q{x} {line - 30} 133 {line + 4}V130H-5z" fill="#e0a85c"/>'
    trunk = f"M{x} {line + 12}v-34M{x} {line - 4}h9v-10"
    cactus = f'<path d="{trunk}" fill="none" stroke="#4d8a4a" stroke-width="6" stroke-linecap="round"/>'
    return box("#f9d9a0", 0) + circle(128 - x, y, 12, "#f4843d") + dunes + cactus
