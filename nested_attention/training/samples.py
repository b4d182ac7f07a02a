"""Which entries are trained on when, and what is read of them there."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .config import TrainingConfig, TrainingError
from .entries import Entry
from .pictures import (
    Size,
    at_most,
    bucket_sizes,
    cover,
    cut,
    nearest_bucket,
    pixels_of,
    read_image,
    reduced,
    vary,
    within,
)
from .troubles import BROKEN, BrokenEntry, Troubles

CROP_SIDE = 1024  # several times what image encoders see; photos of a camera would fill the memory


@dataclass(frozen=True)
class Row:
    """One entry at one place of the training, with all that chance decides there in `seed`."""

    entry: int
    bucket: Size
    seed: int

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(stable_hash(self.seed, purpose))


@dataclass(frozen=True)
class Sample:
    """What a row trains on.

    picture   the whole picture at its bucket's size, [1, H, W, C]; `size` is what its file has
    crop      the subject's, [1, h, w, C]
    subject   False: to be read as nobody in particular
    """

    row: Row
    picture: Tensor
    crop: Tensor
    caption: str
    size: Size
    subject: bool = True


def stable_hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Plan:
    """Which entries are trained on when: a pure function of the seed, so that a step's number is its whole state.

    A batch is that of all processes together, of one bucket; the last of a bucket is filled up from its beginning.
    So that nothing is drawn much more often than the rest, a bucket of less than half a batch joins the nearest.
    """

    def __init__(self, entries: list[Entry], config: TrainingConfig, processes: int):
        sizes = bucket_sizes(config.resolution) if config.buckets else [(config.resolution, config.resolution)]
        self.buckets: dict[Size, list[int]] = {}
        for i, entry in enumerate(entries):
            self.buckets.setdefault(nearest_bucket(entry.size, sizes), []).append(i)
        self.batch, self.seed = config.batch * processes, config.seed
        for size in sorted(self.buckets, key=lambda s: (len(self.buckets[s]), s)):
            if 2 * len(self.buckets[size]) < self.batch and len(self.buckets) > 1:
                few = self.buckets.pop(size)
                self.buckets[nearest_bucket(size, list(self.buckets))] += few
        self.batches_per_epoch = sum(-(-len(members) // self.batch) for members in self.buckets.values())
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[tuple[Size, list[int]]]:
        generator = torch.Generator().manual_seed(stable_hash(self.seed, "epoch", epoch))
        batches = []
        for size, members in sorted(self.buckets.items()):
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            for start in range(0, len(order), self.batch):
                batches.append((size, [order[(start + i) % len(order)] for i in range(self.batch)]))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def rows(self, number: int) -> list[Row]:
        """The rows of a batch, counted from the beginning of the training."""
        epoch, place = divmod(number, self.batches_per_epoch)
        size, members = self.epoch(epoch)[place]
        return [Row(entry, size, stable_hash(self.seed, number, i)) for i, entry in enumerate(members)]


@dataclass
class Reader:
    """Rows to samples. An entry that turns out to be broken is replaced by the next, of its bucket if there is one.

    broken     entries that turned out to be
    left_out   how many more there are: left out of the data, or of those that are only validated on
    """

    entries: list[Entry]
    config: TrainingConfig
    troubles: Troubles
    processes: int = 1
    broken: set[int] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)
    left_out: int = 0

    def __post_init__(self) -> None:
        self.plan = Plan(self.entries, self.config, self.processes)

    @cached_property
    def fingerprint(self) -> str:
        """Short name of what is read, to tell whether a training goes on with the same data."""
        crops = [(i, e.crop.name) for i, e in enumerate(self.entries) if e.crop]
        entries = [(e.image.name, e.caption, e.size, e.box) for e in self.entries]
        return f"{stable_hash(entries, *crops):x}"

    def __call__(self, row: Row) -> Sample:
        for entry in self.candidates(row):
            if entry in self.broken:
                continue
            try:
                return self.read(Row(entry, row.bucket, row.seed))
            except BROKEN as error:
                self.give_up(entry, error)
        raise TrainingError(f"All {len(self.entries)} pictures are broken.")

    def candidates(self, row: Row) -> Iterator[int]:
        """The row's entry; where that is broken, the next of its bucket, then any."""
        yield row.entry
        members = self.plan.buckets[row.bucket]
        after = members.index(row.entry) + 1
        yield from chain(members[after:], members[:after], range(len(self.entries)))

    def give_up(self, entry: int, error: Exception) -> None:
        with self.lock:  # rows are read in threads
            if entry not in self.broken:
                self.broken.add(entry)
                self.troubles.report(f"{self.entries[entry].image.name}: {error}.", BrokenEntry)

    def read(self, row: Row) -> Sample:
        entry, config = self.entries[row.entry], self.config
        image = read_image(entry.image)
        if image.size != entry.size:  # a box or bucket would be that of another picture
            sizes = "{} x {} pixels, not {} x {}".format(*image.size, *entry.size)
            raise ValueError(f"it is {sizes} as before or as its header says (without an orientation?): save it anew")
        crop = read_image(entry.crop) if entry.crop else cut(image, entry.box) if entry.box else image
        whole, part = reduced(image, row.bucket), reduced(crop, within(crop.size, CROP_SIDE))
        picture = pixels_of(whole)
        crop = at_most(picture if part is whole else pixels_of(part), CROP_SIDE)  # the same numbers are made once
        if config.augment:
            crop = vary(crop, config.augment, row.generator("vary"))
        no_caption, no_subject = torch.rand(2, generator=row.generator("dropout")).tolist()
        caption = config.placeholder if no_caption < config.caption_dropout else entry.caption
        return Sample(row, cover(picture, row.bucket), crop, caption, entry.size, no_subject >= config.subject_dropout)
