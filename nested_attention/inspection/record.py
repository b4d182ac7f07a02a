"""What one sampling run attended to, within a limit of memory, on the CPU.

h, w a layer's size; C its inner width, the heads concatenated. Steps count from 1, as progress bars do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from unicodedata import normalize

import torch
from torch import Tensor

from .views import resize


@dataclass(frozen=True)
class Queries:
    """What one layer asked at one step: queries [h * w, C], and the textual value [C] of each subject's token."""

    size: tuple[int, int]
    q: Tensor
    heads: int
    textual: dict[int, Tensor]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.q, *self.textual.values()))


@dataclass
class Record:
    """Attention maps of every recorded step and layer, and each layer's queries of the last of these steps.

    From the queries all else follows by the layer's own equations, for any point, when somebody asks.

    limit     bytes that all of it may take; maps are kept before queries, which are a thousand times larger
    maps      (step, layer, subject) to p_s, [h, w], the mean over heads
    queries   (layer, subjects of the same prompt) to its queries
    labels    layer to its name and size, such as "output 1.0 32x32"
    left_out  layers whose queries did not fit
    lost      maps that did not fit
    """

    limit: int
    maps: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    queries: dict[tuple[int, tuple[int, ...]], Queries] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    lost: int = 0
    used: int = 0
    counts: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def add_map(self, step: int, layer: int, subject: int, p: Tensor) -> None:
        """Keep p_s [h, w]; several of one step (of a sampler that calls the model twice, say) are averaged."""
        key = step, layer, subject
        p = p.detach().to("cpu", torch.float32, copy=True)
        size = p.numel() * p.element_size()
        if key in self.maps:
            if p.shape != self.maps[key].shape:  # of a node that shrinks what is deep inside, for a part of the steps
                p = resize(p, self.maps[key].shape)
            self.counts[key] += 1
            self.maps[key] += (p - self.maps[key]) / self.counts[key]
            return
        while self.used + size > self.limit and self.queries:
            (layer_out, _), queries = self.queries.popitem()
            self.left_out.add(layer_out)
            self.used -= queries.bytes
        if self.used + size > self.limit:
            self.lost += 1
            return
        self.maps[key], self.counts[key] = p, 1
        self.used += size

    def add_queries(self, layer: int, size: tuple[int, int], q: Tensor, heads: int, textual: dict[int, Tensor]) -> None:
        """Keep queries [h * w, C], in their own precision, in place of the layer's earlier ones for these subjects."""
        if layer in self.left_out:
            return
        key = layer, tuple(textual)
        before = self.queries.pop(key, None)
        self.used -= before.bytes if before else 0
        copies = [x.detach().to("cpu", copy=True) for x in (q, *textual.values())]
        queries = Queries(size, copies[0], heads, dict(zip(textual, copies[1:], strict=True)))
        if self.used + queries.bytes > self.limit:
            self.left_out.add(layer)
            return
        self.queries[key] = queries
        self.used += queries.bytes

    def asked(self, layer: int, subject: int) -> Queries | None:
        """The last that this layer asked with this subject in the prompt."""
        found = (x for (number, _), x in reversed(self.queries.items()) if number == layer and subject in x.textual)
        return next(found, None)

    def steps(self) -> list[int]:
        return sorted({step for step, _, _ in self.maps})

    def layers(self, wanted: str = "") -> list[int]:
        """Recorded layers, in the order in which they ran, whose label holds a wanted word; all if none is given."""
        recorded = {layer for _, layer, _ in self.maps}
        return [layer for layer, label in self.labels.items() if layer in recorded and is_wanted(label, wanted)]

    def select(self, subject: int, steps: list[int] | None = None, layers: list[int] | None = None) -> list[Tensor]:
        """Maps of a subject at these steps and layers, or at all."""
        return [
            p
            for (step, layer, number), p in sorted(self.maps.items(), key=lambda item: item[0])
            if number == subject and (steps is None or step in steps) and (layers is None or layer in layers)
        ]


def is_wanted(label: str, wanted: str) -> bool:
    words = [word.strip().lower() for word in normalize("NFKC", wanted).split(",") if word.strip()]
    return not words or any(word in label.lower() for word in words)


def chosen_steps(text: str, total: int) -> set[int]:
    """Steps that "all", "last", "5" or "1-4, 20" mean in a run of so many. Raises ValueError on anything else."""
    chosen: set[int] = set()
    for part in filter(None, (part.strip().lower() for part in (normalize("NFKC", text).strip() or "all").split(","))):
        if part in ("all", "last"):
            chosen |= set(range(1 if part == "all" else total, total + 1))
        elif match := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            if not 1 <= first <= last:
                raise ValueError(f"'{part}' is no step: they count from 1, and a range from its first to its last.")
            chosen |= set(range(first, min(last, total) + 1))
        else:
            raise ValueError(f"'{part}' is no step. Write all, last, a number from 1, or a range: 1-4, 10, last.")
    return chosen
