"""The views drawn: each function makes one section of a sheet, of pictures [H, W, 3] and the numbers of `views`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from .drawing import (
    GAP,
    MARKS,
    PANEL,
    beside,
    captioned,
    color_map,
    framed,
    grid,
    heat_over,
    mark_color,
    owner_map,
    photograph,
    stacked,
    stems,
    swatch,
    titled,
    to_tensor,
    with_marks,
)
from .views import Lookup, Point, nested_values, principal_colors, shares, top_tokens

COLUMNS = 6
OfToken = Callable[[int], tuple[Tensor, Tensor]]  # a nested token's photo [S, S, 3], and where it looked [g, g]


def sheet(title: str, note: str, sections: Sequence[Image.Image]) -> Tensor:
    """Sections under one title, as a picture [1, H, W, 3]."""
    return to_tensor(framed(titled(title, stacked(sections), note)))[None]


def overview(photo: Tensor | None, picture: Tensor, points: Sequence[Point]) -> Image.Image:
    """The subject's photo beside the picture, with the points in it."""
    panels = [] if photo is None else [captioned(photograph(photo), "the subject's photo")]
    return beside([*panels, captioned(with_marks(photograph(picture), points), "the picture")])


def attention(picture: Tensor, name: str, rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]]) -> Image.Image:
    """Where the subject's token is attended: captioned rows of captioned p_s maps [h, w], each row on one scale."""
    drawn = []
    for caption, heats in rows:
        top = max(float(heat.max()) for _, heat in heats)
        panels = [
            captioned(heat_over(picture, heat, top), f"{label}\nmean {heat.mean():.3f}, largest {heat.max():.3f}")
            for label, heat in heats
        ]
        drawn.append(titled("", grid(panels, COLUMNS), f"{caption}: black is 0, pale yellow {top:.3f}"))
    note = "p_s, the part of the attention over the text that goes to it"
    return titled(f"Where {name} is attended", stacked(drawn), note)


def values(picture: Tensor, lookups: Iterable[Lookup]) -> Image.Image:
    """The values that the subject's token has at each place, as colours, above its one constant textual value."""
    panels = []
    like = photograph(picture)
    for lookup in lookups:
        textual = lookup.textual.transpose(1, 2).flatten()
        colors, constant, kept = principal_colors(nested_values(lookup), textual)
        shown = captioned(color_map(colors, lookup.size, like.size), f"{lookup.label}\n{kept:.0%} of the variance")
        panels.append(stacked([shown, swatch(constant, (PANEL, PANEL // 5))]))
    note = "first three principal components of v* as red, green and blue; below it the one value without nesting"
    return titled("What the token's value is at each place", grid(panels, COLUMNS), note)


def at_points(weights: Tensor, layers: int, of_token: OfToken | None = None) -> Image.Image:
    """Nested attention of chosen points [P, M] as stem plots; with photos, where the two largest tokens looked."""
    top = float(weights.max())
    rows = []
    for i, (masses, tokens) in enumerate(zip(*(x.tolist() for x in top_tokens(weights)), strict=True)):
        says = ", ".join(f"token {token} has {mass:.3f}" for mass, token in zip(masses, tokens, strict=True))
        plot = stems(weights[i], MARKS[i % len(MARKS)], (2 * PANEL + GAP, PANEL), top)
        photos = [] if of_token is None else [looked_at(token, of_token) for token in tokens]
        rows.append(beside([captioned(plot, f"point {i + 1}: {says}"), *photos]))
    note = f"softmax(q Kn / sqrt d), mean over heads and {layers} layer(s)"
    note += "" if of_token is None else "; right: the Q-Former's attention over the photo, mean over heads and layers"
    return titled("Which nested tokens each point looks up", stacked(rows), note)


def photo(weights: Tensor, of_token: OfToken) -> Image.Image:
    """The Q-Former's attention over the photo, for the two largest tokens of each point [P, M]."""
    _, tokens = top_tokens(weights)
    panels = [looked_at(token, of_token, f"point {i + 1}: ") for i, row in enumerate(tokens.tolist()) for token in row]
    note = "the Q-Former's attention, mean over its heads and layers"
    return titled("What the points' largest tokens looked at in the photo", grid(panels, COLUMNS), note)


def looked_at(token: int, of_token: OfToken, before: str = "") -> Image.Image:
    picture, heat = of_token(token)
    return captioned(heat_over(picture, heat, float(heat.max())), f"{before}token {token} looked at")


def owners(picture: Tensor, names: Sequence[str], means: Sequence[Tensor]) -> Image.Image:
    """With several subjects: whose place is whose by their mean p_s [h, w], and how many places each owns."""
    part = shares(means)
    owner = part.argmax(0)
    panels = [captioned(owner_map(picture, part), "owner of each place\npale where they share it")]
    for i, name in enumerate(names):
        area = float((owner == i).float().mean())
        heat = captioned(heat_over(picture, part[i], 1.0), f"{name}: {area:.0%} of the places\nits share, from 0 to 1")
        panels.append(stacked([heat, swatch(torch.tensor(mark_color(i)), (PANEL, PANEL // 16))]))
    return titled("Who owns which place", grid(panels, COLUMNS), "each subject's part of the attention to all subjects")
