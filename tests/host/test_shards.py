"""WebDataset shards: what the library webdataset reads, at random, and trained on as the same data in a folder is."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch
import webdataset
from PIL import Image
from small_training import exact, losses, make_base, make_data, make_reader, samples_of, save_picture, settings

from nested_attention.host.train import train
from nested_attention.training.config import TrainingError
from nested_attention.training.entries import read_dataset
from nested_attention.training.pictures import read_picture
from nested_attention.training.troubles import Troubles


def pack(data, pattern: str, per_shard: int) -> None:
    """A folder's pictures and captions as shards, by the library's own writer."""
    with webdataset.ShardWriter(str(data.parent / pattern), maxcount=per_shard, verbose=0) as writer:
        for image in sorted(p for p in data.glob("*.png") if ".subject." not in p.name):
            crop = image.with_name(f"{image.stem}.subject.png")
            parts = {"subject.png": crop.read_bytes()} if crop.exists() else {}
            parts |= {"png": image.read_bytes(), "txt": image.with_suffix(".txt").read_text()}
            writer.write({"__key__": image.stem, **parts})


def append(path, **parts: bytes) -> None:
    with tarfile.open(path, "a") as tar:
        for name, content in parts.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    make_data(tmp_path, count=4)
    save_picture(tmp_path / "data" / "2.subject.png", 9, size=(16, 24))
    pack(tmp_path / "data", "shards-%03d.tar", per_shard=2)
    return tmp_path


def read(config):
    troubles = Troubles(config.on_error)
    return read_dataset(config, troubles), troubles


def test_entries_are_those_of_the_folder_and_of_the_library(folder):
    (folder / "shards").mkdir()
    for shard in folder.glob("*.tar"):
        (folder / "shards" / shard.name).write_bytes(shard.read_bytes())
    expected, _ = read(settings(folder))
    samples = [
        s for shard in sorted(folder.glob("*.tar")) for s in webdataset.WebDataset(str(shard), shardshuffle=False)
    ]
    for data in ("shards-{000..001}.tar", "shards"):
        entries, _ = read(settings(folder, data=str(folder / data)))
        assert len(entries) == len(expected) == len(samples) == 4
        for entry, file, sample in zip(entries, expected, samples, strict=True):
            assert (entry.caption, entry.size) == (file.caption, file.size)
            assert torch.equal(read_picture(entry.image), read_picture(file.image))
            assert torch.equal(read_picture(entry.image), read_picture(Bytes(sample["png"])))
            assert (entry.crop is None) == (file.crop is None) == ("subject.png" not in sample)
        assert torch.equal(read_picture(entries[2].crop), read_picture(expected[2].crop))
        assert entries[3].image.name == "shards-001.tar: 3.png"


class Bytes(io.BytesIO):
    def open(self, mode):
        return self


@exact
def test_training_is_the_folders_and_goes_on_where_it_was(folder):
    base, changes = make_base(), {"augment": 1.0, "caption_dropout": 0.3}
    assert train(settings(folder, **changes), base)
    shards = settings(folder, data=str(folder / "shards-{000..001}.tar"), output=str(folder / "shards"), **changes)
    calls = iter([False, True])
    assert not train(shards, base, stop=lambda: next(calls))
    assert train(shards, base)
    assert losses(shards) == losses(settings(folder)) and len(losses(shards)) == 4


def test_broken_entries_are_named(folder, caplog):
    picture = (folder / "data" / "0.png").read_bytes()
    shard = folder / "shards-000.tar"
    append(
        shard, a__png=picture, b__txt=b"a person", c__png=picture, c__txt=b"a cat", d__png=b"none", d__txt=b"a person"
    )
    append(shard, e__png=picture, e__json=b"[1]", f__png=picture, f__json=b'{"width": 3}', __meta__=b"")
    append(shard, **{"g__png": picture, "g__json": json.dumps({"caption": "a person", "box": [1, 2, 9, 9]}).encode()})
    append(shard, **{"h__png": picture, "h__PNG": picture, "h__txt": b"a person", "._i__png": b""})
    config = settings(folder, data=str(folder / "shards-{000..002}.tar"), on_error="skip")
    entries, troubles = read(config)
    assert [e.image.entry for e in entries] == ["0", "1", "g", "2", "3"] and entries[2].box == (1, 2, 9, 9)
    problems = ("a: no caption", "b: no picture", "c: the caption 'a cat'", "d: cannot identify", "e: its .json holds")
    for problem in (*problems, "f: no caption", "h: a part of it is there twice"):
        assert f"shards-000.tar: {problem}" in caplog.text
    assert "shards-002.tar: the shard cannot be read to its end" in caplog.text and troubles.count == 8
    with pytest.raises(TrainingError, match="shards-000.tar: a: no caption"):
        read(settings(folder, data=str(folder / "shards-{000..001}.tar")))
    with pytest.raises(TrainingError, match="There is no data at"):
        read(settings(folder, data=str(folder / "gone-{0..9}.tar")))


@pytest.mark.parametrize("damage", ["checksum", "negative", "pax"])
def test_a_damaged_header_ends_a_shard_loudly(folder, caplog, damage):
    """tarfile takes such for the end of the archive, or reads it for ever."""
    path = folder / "shards-000.tar"
    good = len(read(settings(folder, data=str(path)))[0])
    info = tarfile.TarInfo("more.png")
    if damage == "negative":
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[124:136] = (-512).to_bytes(12, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
    elif damage == "pax":
        info.pax_headers = {"size": "-512"}
        header = info.tobuf(tarfile.PAX_FORMAT)
    else:
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[0] ^= 1
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    path.write_bytes(whole[:end] + bytes(header) + whole[end:])
    entries, troubles = read(settings(folder, data=str(path), on_error="skip"))
    assert len(entries) == good and troubles.count == 1 and "the shard cannot be read to its end" in caplog.text


def test_a_range_without_end(folder):
    with pytest.raises(ValueError, match="would be 1000000000 shards"):
        read(settings(folder, data=str(folder / "shards-{1..1000000000}.tar")))


def test_a_shard_that_breaks_off(folder, caplog):
    """What was whole is read; a picture that breaks off later than its header is found out when it is needed."""
    Image.effect_noise((64, 64), 50).save(folder / "data" / "3.png")
    pack(folder / "data", "cut-%d.tar", per_shard=4)
    shard = folder / "cut-0.tar"
    with tarfile.open(shard) as tar:
        [last] = [info for info in tar if info.name == "3.png"]
    shard.write_bytes(shard.read_bytes()[: last.offset_data + 200])
    config = settings(folder, data=str(shard), on_error="skip")
    entries, troubles = read(config)
    assert [e.image.entry for e in entries] == ["0", "1", "2"] and "cut-0.tar: the shard cannot be read" in caplog.text
    content = (folder / "shards-001.tar").read_bytes()
    entries, _ = read(settings(folder, data=str(folder / "shards-001.tar"), on_error="skip"))
    (folder / "shards-001.tar").write_bytes(content[: entries[1].image.offset + 60])
    reader = make_reader(entries, config)
    assert {s.row.entry for n in range(2) for s in samples_of(reader, n)} == {0} and reader.troubles.count == 1
