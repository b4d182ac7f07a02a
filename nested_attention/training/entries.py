"""Pairs to train on: a picture with its caption, and the crop of its subject.

A folder holds pictures with a .txt caption beside each (and, if wanted, the crop as name.subject.png). A .jsonl file
has one object a line, {"image": ..., "caption": ..., "box": [left, top, right, bottom] or "crop": ...}, paths from its
own folder. Shards are .tar files of what a folder holds.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import TrainingConfig, TrainingError
from .pictures import SUFFIXES, Box, Size, Source, picture_size
from .shards import expand, shard_records, text_of
from .troubles import BROKEN, Troubles

log = logging.getLogger("nested_attention")
LEFT_OUT = (".", "__MACOSX")
SUBJECT = ".subject"  # how the name of a crop ends, before its suffix

Records = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # an entry's name, and what reads it


@dataclass(frozen=True)
class Entry:
    """A picture [its size], its caption with the placeholder, and where its subject is; None: all of it."""

    image: Source
    caption: str
    size: Size
    box: Box | None = None
    crop: Source | None = None


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
        broken = f" ({troubles.count} are broken)" if troubles.count else ""
        raise TrainingError(
            f"{path} holds no usable entry{broken}. Pictures are {', '.join(SUFFIXES)}; shards are .tar, uncompressed."
        )
    return entries


def records(path: Path) -> Records:
    """Raises TrainingError where there is nothing of the kind."""
    if path.is_dir():
        found = files_of(path, (".tar", *SUFFIXES))
    else:
        found = expand(path) if path.suffix.lower() == ".tar" else []
    shards = [p for p in found if p.suffix.lower() == ".tar"]
    pictures = [p for p in found if p.suffix.lower() != ".tar"]
    lines = path.is_file() and path.suffix.lower() in (".jsonl", ".ndjson")
    if not (lines or pictures or any(shard.exists() for shard in shards)):
        raise TrainingError(
            f"There is no data at {path}: expected a folder of pictures, a .jsonl file, or .tar shards."
        )
    return found_records(path, shards, pictures)


def found_records(path: Path, shards: Sequence[Path], pictures: Sequence[Path]) -> Records:
    if path.is_dir():
        yield from folder_records(path, pictures)
    elif not shards:
        yield from line_records(path)
    for shard in shards:
        yield from shard_records(shard)


def files_of(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """All files of these kinds in a folder and those it links to, but hidden ones and what macOS adds to archives."""
    found, entered = [], set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=say_left_out):
        folders[:] = sorted(name for name in folders if not name.startswith(LEFT_OUT))
        if (real := os.path.realpath(place)) in entered:  # a link to what holds it has no end
            folders.clear()
            continue
        entered.add(real)
        paths = (Path(place, name) for name in names if not name.startswith(LEFT_OUT))
        found += [path for path in paths if path.suffix.lower() in suffixes]
    return sorted(found)


def say_left_out(error: OSError) -> None:
    log.warning("A folder of the data is left out: %s.", error)


def folder_records(folder: Path, pictures: Sequence[Path]) -> Records:
    """Of all its pictures, crops of subjects among them."""
    images = [p for p in pictures if f"{SUBJECT}." not in p.name.lower()]
    shown = {p.with_suffix("") for p in images}
    subjects = sorted({*pictures} - {*images}, key=lambda p: (-SUFFIXES.index(p.suffix.lower()), p))
    crops = {p.with_name(p.stem[: -len(SUBJECT)]): p for p in subjects if p.stem.lower().endswith(SUBJECT)}
    captions = {p for p in files_of(folder, (".txt",)) if p.with_suffix("") not in shown}
    for what, lonely in (".txt files", captions), ("crops of subjects", {*subjects} - {*map(crops.get, shown)}):
        if lonely:
            known = ", ".join(SUFFIXES)
            log.warning("No picture (%s) stands beside %d %s, such as %s.", known, len(lonely), what, min(lonely).name)
    for image in images:
        crop = crops.get(image.with_suffix(""))
        yield str(image.relative_to(folder)), lambda image=image, crop=crop: folder_record(image, crop)


def folder_record(image: Path, crop: Path | None) -> dict[str, Any]:
    caption = image.with_suffix(".txt")
    if not caption.exists():
        raise ValueError(f"no caption beside it (expected {caption.name})")
    return {"image": image, "caption": text_of(caption.read_bytes(), caption.name), "crop": crop}


def line_records(path: Path) -> Records:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            yield f"{path.name} line {number}", lambda line=line: line_record(line, path.parent)


def line_record(line: bytes, folder: Path) -> dict[str, Any]:
    record = json.loads(text_of(line, "the line"))
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("image", "caption")):
        raise ValueError('expected an object with at least "image" and "caption"')
    if unknown := sorted(record.keys() - {"image", "caption", "box", "crop"}):
        raise ValueError(f"unknown keys {', '.join(unknown)}")
    crop = record.get("crop")
    if crop and record.get("box"):
        raise ValueError("the subject is given by a box and by a crop: leave one of them out")
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
