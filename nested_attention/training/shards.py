"""Shards in the WebDataset format: .tar files in which the parts of an entry share a name and stand side by side.

    anna.jpg    anna.txt    anna.subject.png (optional)    anna.json (optional: "caption" without a .txt, "box")

A shard's headers are read once, then every entry at its own offset: any order, as a folder's, and so a training that
goes on exactly where it was. (The library webdataset reads streams through a shuffling buffer: no such place.)
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from .pictures import SUFFIXES

ENTRY = re.compile(r"((?:.*/)?[^./]+)(\.[^/]+)")  # 'people/anna' and '.subject.png'; hidden files are none
MOST_SHARDS = 100_000
META = re.compile(r"__[^/]*__($|/)")  # what the format keeps to itself


@dataclass(frozen=True)
class Member:
    """A part of an entry: a file in a shard, `size` bytes from `offset` on."""

    shard: Path
    entry: str
    part: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.shard.name}: {self.entry}{self.part}"

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """Raises OSError or ValueError where it cannot be read, also while it is read."""
        info = tarfile.TarInfo(self.name)
        info.offset_data, info.size = self.offset, self.size
        try:
            with tarfile.open(self.shard, "r:") as tar, tar.extractfile(info) as file:
                yield file
        except tarfile.TarError as error:
            raise ValueError(str(error)) from error

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()


def expand(path: Path) -> list[Path]:
    """The files that a pattern such as shards-{000..010}.tar names."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", path.name)
    if not found:
        return [path]
    first, last = found.groups()
    if int(last) - int(first) > MOST_SHARDS:
        raise ValueError(f"{path.name} would be {int(last) - int(first) + 1} shards")
    numbers = (f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1))
    return [p for n in numbers for p in expand(path.with_name(path.name.replace(found[0], n, 1)))]


def shard_records(shard: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name of each entry, and what reads its record. A damaged shard is one more entry, which cannot be read."""
    found, broken = [], None
    try:
        for member in members(shard):
            found.append(member)
    except (OSError, ValueError, OverflowError, MemoryError, tarfile.TarError) as error:
        broken = error
    for entry, group in groupby(found, lambda member: member.entry):
        parts = list(group)
        yield f"{shard.name}: {entry}", lambda parts=parts: shard_record(parts)
    if broken:
        yield shard.name, lambda: cannot_be_read(broken)


class Header(tarfile.TarInfo):
    """What tarfile takes for the end of a shard, or reads for ever, is an error here."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Header:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:
            raise ValueError(f"a header in it is damaged: {error}") from error
        if info.size < 0:
            raise ValueError("a header in it tells of a negative size")
        return info


def members(shard: Path) -> Iterator[Member]:
    with tarfile.open(shard, "r:", tarinfo=Header) as tar:
        for info in tar:
            if info.size < 0:  # of a header beside the header
                raise ValueError("a header in it tells of a negative size")
            found = ENTRY.fullmatch(info.name)
            if found and info.isreg() and not META.match(info.name):
                yield Member(shard, found[1], found[2], info.offset_data, info.size)


def shard_record(parts: list[Member]) -> dict[str, Any]:
    """Raises ValueError, with what is wrong, for an entry that cannot be trained on."""
    named = {member.part.lower(): member for member in parts}
    if len(named) < len(parts):
        raise ValueError("a part of it is there twice")
    image = next((named[suffix] for suffix in SUFFIXES if suffix in named), None)
    if image is None:
        raise ValueError(f"no picture among its parts ({', '.join(named)})")
    facts = json.loads(named[".json"].read()) if ".json" in named else {}
    if not isinstance(facts, dict):
        raise ValueError("its .json holds no object")
    caption = text_of(named[".txt"].read(), "its .txt") if ".txt" in named else facts.get("caption")
    if not isinstance(caption, str):
        raise ValueError('no caption (expected a .txt, or a .json with "caption")')
    crop = next((named[f".subject{suffix}"] for suffix in SUFFIXES if f".subject{suffix}" in named), None)
    return {"image": image, "caption": caption, "crop": crop, "box": None if crop else facts.get("box")}


def text_of(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8 (byte {error.start}): save it as such") from error


def cannot_be_read(error: Exception) -> dict[str, Any]:
    raise ValueError(f"the shard cannot be read to its end ({error})")
