"""From a recording to its views: nested keys and values anew, the Q-Former on the photos, and which of it to draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import comfy.model_management
import torch
from PIL import Image
from torch import Tensor

from ..attention import NestedToken, split_heads
from ..inspection import figures
from ..inspection.views import Lookup, Point, average, image_attention, patch_maps, point_weights
from .adapters import BoundSubject, LoadedAdapter, nested_pair
from .images import differ_in_aspect, encode
from .recording import Recording

VIEWS = ("sheet", "attention", "attention per step", "attention per layer", "values", "points", "photo", "owners")
FEW = figures.COLUMNS  # steps and layers on the sheet


@dataclass(frozen=True)
class Photos:
    """A subject's photos as the image encoder saw them [B, S, S, 3], and what each nested token looked at there.

    attention   [B, Q, g, g] over the patches of each photo
    """

    seen: Tensor
    attention: Tensor

    def of_token(self, token: int) -> tuple[Tensor, Tensor]:
        """Photo [S, S, 3] and heat map [g, g] of one of the subject's nested tokens."""
        photo, query = divmod(token, self.attention.shape[1])
        return self.seen[photo], self.attention[photo, query]


def look_at_photos(
    adapter: LoadedAdapter, clip_vision: Any, images: Tensor, tokens: Tensor
) -> tuple[Photos | None, str]:
    """What a subject's nested tokens [1, M, C] looked at in its photos [B, H, W, 3], and what is to be said of it.

    None where these photos make another number of tokens.
    """
    seen, features = encode(clip_vision, images, None, "center crop", adapter.config)
    patcher = adapter.patcher
    comfy.model_management.load_models_gpu([patcher])
    made, attention = [], []
    for photo in features.to(patcher.load_device, torch.float32).split(1):
        with torch.no_grad():
            nested, over_photo = image_attention(patcher.model.resampler, photo)
        made.append(nested.cpu())
        attention.append(patch_maps(over_photo.cpu()))
    joined = torch.cat(made, dim=1)
    if joined.shape != tokens.shape:
        return None, (
            f"What its tokens looked at is not shown: the subject has {tokens.shape[1]}, of {len(images)} photos come "
            f"{joined.shape[1]}. Connect the output 'seen' of its Encode Subject, with 'concatenate' there: averaged "
            "tokens come from no single photo."
        )
    difference = (joined - tokens.cpu().float()).norm() / joined.norm()
    other = (
        "This photo makes other tokens than the subject's: connect the output 'seen' of its own Encode Subject. "
        "Averaged and blended ones come from no single photo."
    )
    return Photos(seen.cpu(), torch.cat(attention)), "" if difference < 0.02 else other


def number_of(recording: Recording, bound: BoundSubject) -> int:
    """The subject's number in the recorded run. Raises ValueError where it was not in it."""
    for number, subject in enumerate(recording.subjects):
        same = subject.adapter.fingerprint == bound.adapter.fingerprint
        if same and torch.equal(subject.tokens.cpu(), bound.subject.tokens.cpu()):
            return number
    names = ", ".join(subject.placeholder for subject in recording.subjects)
    raise ValueError(
        f"The recorded run holds {names}, but not this subject. Connect the one that Apply Subject has; if it is that, "
        "its strength is 0 there, or its start_percent not below its end_percent."
    )


def lookups(recording: Recording, number: int, layers: Sequence[int]) -> Iterator[Lookup]:
    """What a subject's token looked up in layers whose queries were kept, one layer at a time: they are large."""
    subject = recording.subjects[number]
    patcher, config = subject.adapter.patcher, subject.adapter.config
    comfy.model_management.load_models_gpu([patcher])
    tokens = subject.tokens.to(patcher.load_device, torch.float32)
    for layer in layers:
        queries, label = recording.record.asked(layer, number), recording.record.labels[layer]
        with torch.no_grad():
            pair = nested_pair(patcher.model, layer, tokens, queries.heads, recording.dtype)
        keys, values = (x.to("cpu", queries.q.dtype).float() for x in pair)  # through the precision of the run
        asked = queries.q, queries.textual[number][None]
        q, textual = (split_heads(x.float()[None], queries.heads) for x in asked)
        token = NestedToken((0,), keys, values, norm=config.norm, norm_factor=config.norm_factor)
        yield Lookup(label, queries.size, q, textual, token)


@dataclass(frozen=True)
class Inspection:
    """One subject of a recorded run, ready to be drawn.

    number    the subject's number in the run
    layers    the layers to show
    picture   what the run made, [H, W, 3]
    photos    the subject's photos [B, H, W, 3], and the image encoder that reads them, or None
    """

    recording: Recording
    bound: BoundSubject
    number: int
    layers: list[int]
    points: list[Point]
    picture: Tensor
    photos: Tensor | None = None
    clip_vision: Any = None

    def draw(self, view: str) -> Tensor:
        """One of VIEWS as a picture [1, H, W, 3]. Raises ValueError where something that it needs is missing."""
        sections = ["attention", "values", "points"] if view == "sheet" else [view]
        if view == "sheet" and len(self.recording.subjects) > 1:
            sections.insert(1, "owners")
        drawn = [self.section(each, FEW if view in ("sheet", "attention") else None) for each in sections]
        photo = None if self.photos is None else self.photos[0].cpu().float()
        note = f"seed {self.recording.seed}; {self.recording.summary()}"
        if "points" in sections or view == "photo":
            note += f"\n{self.looked_at[1]}"
        overview = figures.overview(photo, self.picture, self.points)
        return figures.sheet(f"Nested attention: {self.name} ({view})", note, [overview, *drawn])

    def section(self, name: str, few: int | None) -> Image.Image:
        if name == "owners":
            return figures.owners(self.picture, *self.everyone())
        if name == "values":
            return figures.values(self.picture, lookups(self.recording, self.number, spread(self.kept, few or 3 * FEW)))
        if name in ("points", "photo"):
            return self.at_points(name)
        return figures.attention(self.picture, self.name, self.attention(name, few))

    @property
    def name(self) -> str:
        return self.recording.subjects[self.number].placeholder

    @cached_property
    def kept(self) -> list[int]:
        """Layers of which there are queries. Raises ValueError where there are none."""
        kept = [n for n in self.layers if self.recording.record.asked(n, self.number)]
        if not kept:
            raise ValueError(
                f"No queries of {self.name} were kept in these layers. Raise limit_mb of Record Nested Attention, or "
                f"record fewer layers, up to a step at which the subject is active. {self.recording.summary()}"
            )
        return kept

    @cached_property
    def looked_at(self) -> tuple[Photos | None, str]:
        """What the subject's tokens looked at, if that is known, and what is to be said of it."""
        if self.photos is None or self.clip_vision is None:
            return None, "Connect photo and clip_vision to see what the subject's tokens looked at."
        return look_at_photos(self.bound.adapter, self.clip_vision, self.photos, self.bound.subject.tokens)

    def attention(self, view: str, few: int | None) -> list[tuple[str, list[tuple[str, Tensor]]]]:
        """Rows of captioned p_s maps."""
        record, run = self.recording.record, self.recording
        select = partial(record.select, self.number)
        everything = select(layers=self.layers)
        if not everything:
            raise ValueError(
                f"{self.name} was not active at the recorded steps, or no prompt holds it: see Apply Subject."
            )
        steps = spread([step for step in record.steps() if select([step], self.layers)], few and few - 1)
        layers = spread([layer for layer in self.layers if select(layers=[layer])], few)
        by_step = [("mean of all", average(everything))]
        by_step += [(f"step {s} of {run.total}", average(select([s], self.layers))) for s in steps]
        by_layer = [(record.labels[n], average(select(layers=[n]))) for n in layers]
        rows = {
            "attention per step": [("by step, mean over layers", by_step)],
            "attention per layer": [("by layer, mean over steps", by_layer)],
        }
        return rows.get(view, [row for each in rows.values() for row in each])

    def everyone(self) -> tuple[list[str], list[Tensor]]:
        """Each subject that was attended, and its mean p_s."""
        maps = [self.recording.record.select(i, layers=self.layers) for i in range(len(self.recording.subjects))]
        seen = [(s.placeholder, average(m)) for s, m in zip(self.recording.subjects, maps, strict=True) if m]
        return [name for name, _ in seen], [mean for _, mean in seen]

    def at_points(self, view: str) -> Image.Image:
        if not self.points:
            raise ValueError("Write at least one point, x,y in 0 to 1 of the picture: 0.5,0.4")
        weights = point_weights(lookups(self.recording, self.number, self.kept), self.points)
        photos, said = self.looked_at
        if view == "points":
            return figures.at_points(weights, len(self.kept), photos and photos.of_token)
        if photos is None:
            raise ValueError(said)
        return figures.photo(weights, photos.of_token)


def inspect(
    recording: Recording, bound: BoundSubject, generated: Tensor, *, layers: str, points: list[Point], **photos: Any
) -> Inspection:
    """generated: the run's pictures [B, H, W, 3].

    Raises ValueError where the run has no such subject or layers, or made no picture of that shape.
    """
    if differ_in_aspect(generated.shape[1:3], recording.size):
        (high, wide), (height, width) = recording.size, generated.shape[1:3]
        raise ValueError(
            f"The record is of latents of {wide} x {high}, the picture has {width} x {height}: another shape. Connect "
            "the picture as it was sampled. A node that samples parts of a picture cannot be inspected."
        )
    number, chosen = number_of(recording, bound), recording.record.layers(layers)
    if not chosen:
        labels = ", ".join(recording.record.labels.values())
        raise ValueError(f"No recorded layer's name holds '{layers}'. There are: {labels}.")
    picture = generated[min(recording.shown, len(generated) - 1)].cpu().float()
    return Inspection(recording, bound, number, chosen, points, picture, **photos)


def spread(items: Sequence[int], count: int | None) -> list[int]:
    """At most so many of the items, evenly spaced, first and last among them."""
    if count is None or len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
