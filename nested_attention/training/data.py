"""Pairs to train on: a picture with its caption, and the crop of its subject.

A folder holds pictures with a .txt caption beside each (and, if wanted, the crop as name.subject.png). A .jsonl file
has one object a line, {"image": ..., "caption": ..., "box": [left, top, right, bottom] or "crop": ...}, paths from its
own folder. Shards are .tar files of what a folder holds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import TrainingConfig, TrainingError
from .pictures import (
    SUFFIXES,
    Box,
    Size,
    Source,
    at_most,
    bucket_sizes,
    cover,
    cut,
    nearest_bucket,
    picture_size,
    read_picture,
    vary,
)
from .shards import expand, shard_records

log = logging.getLogger("nested_attention")
BROKEN = (OSError, ValueError, RecursionError)  # what is raised for an entry that cannot be used
CROP_SIDE = 1024  # several times what image encoders see; photos of a camera would fill the memory
Records = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # an entry's name, and what reads it


class BrokenEntry(TrainingError):
    """An entry could not be read; the training is as it was before."""


@dataclass
class Troubles:
    """What goes wrong on the way: the first stops the training, or each is named and counted, as configured."""

    on_error: str
    count: int = 0

    def report(self, problem: str, error: type[TrainingError] = TrainingError) -> None:
        self.count += 1
        if self.on_error == "stop":
            raise error(f"{problem} (To leave such things out and go on, set on_error to skip.)")
        log.warning("Skipped (%d so far): %s", self.count, problem)


@dataclass(frozen=True)
class Entry:
    """A picture [its size], its caption with the placeholder, and where its subject is; None: all of it."""

    image: Source
    caption: str
    size: Size
    box: Box | None = None
    crop: Source | None = None


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


def read_dataset(config: TrainingConfig, troubles: Troubles) -> list[Entry]:
    """All usable entries, in a fixed order. Raises TrainingError where there is none."""
    path = Path(config.data)
    entries = []
    for name, record in records(path):
        try:
            entries.append(make_entry(record(), config))
        except BROKEN as error:
            troubles.report(f"{name}: {error}.")
    if not entries:
        raise TrainingError(f"{path} holds no usable entry ({troubles.count} are broken).")
    return entries


def records(path: Path) -> Records:
    """Raises TrainingError where there is nothing of the kind."""
    shards = files_of(path, (".tar",)) if path.is_dir() else expand(path) if path.suffix == ".tar" else []
    lines = path.is_file() and path.suffix.lower() in (".jsonl", ".ndjson")
    if not (path.is_dir() or lines or any(shard.exists() for shard in shards)):
        raise TrainingError(
            f"There is no data at {path}: expected a folder of pictures, a .jsonl file, or .tar shards."
        )
    if path.is_dir():
        yield from folder_records(path)
    elif not shards:
        yield from line_records(path)
    for shard in shards:
        yield from shard_records(shard)


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """All files of these kinds in a folder, but hidden ones and what macOS leaves in archives."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(
        p for p in found if not any(part.startswith((".", "__MACOSX")) for part in p.relative_to(folder).parts)
    )


def folder_records(folder: Path) -> Records:
    for image in (p for p in files_of(folder, SUFFIXES) if ".subject." not in p.name):
        crop = next((c for s in SUFFIXES if (c := image.with_name(f"{image.stem}.subject{s}")).exists()), None)
        yield str(image.relative_to(folder)), lambda image=image, crop=crop: folder_record(image, crop)


def folder_record(image: Path, crop: Path | None) -> dict[str, Any]:
    caption = image.with_suffix(".txt")
    if not caption.exists():
        raise ValueError(f"no caption beside it (expected {caption.name})")
    return {"image": image, "caption": caption.read_text(encoding="utf-8-sig"), "crop": crop}


def line_records(path: Path) -> Records:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            yield f"{path.name} line {number}", lambda line=line: line_record(line, path.parent)


def line_record(line: bytes, folder: Path) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("image", "caption")):
        raise ValueError('expected an object with at least "image" and "caption"')
    if unknown := sorted(record.keys() - {"image", "caption", "box", "crop"}):
        raise ValueError(f"unknown keys {', '.join(unknown)}")
    crop = record.get("crop")
    if not isinstance(crop, (str, type(None))):
        raise ValueError(f"the crop {crop} is no name of a file")
    return {**record, "image": folder / record["image"], "crop": folder / crop if crop else None}


def make_entry(record: dict[str, Any], config: TrainingConfig) -> Entry:
    """Raises ValueError or OSError, with what is wrong, for a record that cannot be trained on."""
    caption = config.subject_caption(record["caption"])
    caption.encode()  # half an emoji is no text
    size, crop = picture_size(record["image"]), record["crop"]
    if crop is not None:
        picture_size(crop)
    return Entry(record["image"], caption, size, check_box(record.get("box"), size), crop)


def check_box(box: Any, size: Size) -> Box | None:
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, (int, float)) for x in box):
        raise ValueError(f"the box {box} is not [left, top, right, bottom]")
    left, top, right, bottom = box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise ValueError(f"the box {box} is empty or outside of the picture of {size[0]} x {size[1]} pixels")
    return left, top, right, bottom


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
    """Rows to samples. An entry that turns out to be broken is replaced by the next, of its bucket if there is one."""

    entries: list[Entry]
    config: TrainingConfig
    troubles: Troubles
    processes: int = 1
    broken: set[int] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.plan = Plan(self.entries, self.config, self.processes)

    @cached_property
    def fingerprint(self) -> str:
        """Short name of what is read, to tell whether a training goes on with the same data."""
        return f"{stable_hash([(e.image.name, e.caption, e.size, e.box) for e in self.entries]):x}"

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
        picture = read_picture(entry.image)
        crop = read_picture(entry.crop) if entry.crop else cut(picture, entry.box) if entry.box else picture
        crop = at_most(crop, CROP_SIDE)
        if config.augment:
            crop = vary(crop, config.augment, row.generator("vary"))
        no_caption, no_subject = torch.rand(2, generator=row.generator("dropout")).tolist()
        caption = config.placeholder if no_caption < config.caption_dropout else entry.caption
        return Sample(row, cover(picture, row.bucket), crop, caption, entry.size, no_subject >= config.subject_dropout)
