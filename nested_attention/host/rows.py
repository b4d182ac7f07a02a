"""Which rows and columns of a batch hold which subject.

The host concatenates, repeats and pads conditioning entries into batches; a tensor beside the text in `model_conds`
goes through all of that with it. It is made once a run, on the CPU, and read once a step into Python integers, so that
attention never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.conds
import torch
import torch.nn.functional as F
from torch import Tensor

from . import KEY
from .marks import Placement, Section, find_placements, unsigned

if TYPE_CHECKING:
    from .recording import Call

REGION_KEY = "nested_attention_region"


class Use(NamedTuple):
    """A subject (its number in the run) at columns of some rows, with the weight that the prompt gives it."""

    subject: int
    columns: tuple[int, ...]
    weight: float


class Rows(NamedTuple):
    start: int
    stop: int
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Layout:
    """One batch: its size, its text length, the rows that hold subjects; region masks [B, S, h, w] if any.

    watch   records what the layers do with this batch, if anybody wants to know
    """

    rows: int
    columns: int
    groups: tuple[Rows, ...]
    regions: Tensor | None = None
    resized: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    watch: Call | None = None

    def region(self, subject: int, rows: Rows, height: int, width: int) -> Tensor | None:
        """A subject's region at a layer's size, [rows, h * w]."""
        if self.regions is None:
            return None
        size = (height, width)
        if size not in self.resized:
            self.resized[size] = F.interpolate(self.regions, size, mode="bilinear").flatten(2)
        return self.resized[size][rows.start : rows.stop, subject]


def entry_placements(entry: dict[str, Any], ledger: dict[str, Section]) -> list[list[Placement]]:
    """Subjects in each row of a conditioning entry's text."""
    context = entry.get("cross_attn")
    if context is None:
        return []
    return find_placements(context, entry.get(KEY) or [], ledger)


def with_bare_text(entry: dict[str, Any], ledger: dict[str, Section]) -> dict[str, Any]:
    """A conditioning entry with the text that the host would have without subjects."""
    context = entry.get("cross_attn")
    if context is None:
        return entry
    return {**entry, "cross_attn": unsigned(context, entry.get(KEY) or [], ledger)}


def place_tensor(entry: dict[str, Any], placements: list[list[Placement]], numbers: dict[str, int]) -> Tensor:
    """[rows, T, 2]: at each text column the number of the subject (from 1; 0 is none) and its weight."""
    context = entry.get("cross_attn")
    tensor = torch.zeros(1, 1, 2) if context is None else torch.zeros(*context.shape[:2], 2)
    for row, found in enumerate(placements):
        for placement in found:
            if placement.placeholder in numbers:
                number = 1.0 + numbers[placement.placeholder]
                tensor[row, placement.column] = torch.tensor([number, placement.weight])
    return tensor


def with_places(entry: dict[str, Any], places: Tensor, regions: Tensor | None) -> dict[str, Any]:
    """A copy of a conditioning entry that carries the places, and region masks [B, S, h, w], beside its text.

    Every entry gets them: the host batches only entries that carry the same things.
    """
    added = {KEY: comfy.conds.CONDCrossAttn(places)}
    if regions is not None:
        added[REGION_KEY] = comfy.conds.CONDNoiseShape(regions)
    return {**entry, "model_conds": {**entry["model_conds"], **added}}


def read_layout(places: Tensor, regions: Tensor | None, active: Iterable[int], watch: Call | None = None) -> Layout:
    """Layout of a batch from the tensor [B, T, 2] that the host made of its entries' tensors."""
    active = set(active)
    uses = [row_uses(row, active) for row in places.tolist()]
    groups, start = [], 0
    for key, same in groupby(uses):
        stop = start + len(list(same))
        if key:
            groups.append(Rows(start, stop, key))
        start = stop
    return Layout(len(places), places.shape[1], tuple(groups), regions, watch=watch)


def row_uses(row: list[list[float]], active: set[int]) -> tuple[Use, ...]:
    columns: dict[tuple[int, float], list[int]] = {}
    for column, (number, weight) in enumerate(row):
        if number and int(number) - 1 in active:
            columns.setdefault((int(number) - 1, weight), []).append(column)
    return tuple(Use(subject, tuple(found), weight) for (subject, weight), found in columns.items())
