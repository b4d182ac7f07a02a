"""What is trained on: broken entries are named, pictures of any kind are read as they are shown."""

from __future__ import annotations

import json
import struct
from zlib import crc32

import pytest
import torch
from PIL import Image, PngImagePlugin
from small_training import make_base, make_data, make_reader, samples_of, save_picture, settings

from nested_attention.host.train import split, train
from nested_attention.training.config import TrainingError, from_arguments
from nested_attention.training.entries import files_of, read_dataset
from nested_attention.training.pictures import cover, cut, picture_size, read_picture, reduced, vary
from nested_attention.training.samples import Row
from nested_attention.training.troubles import Troubles


@pytest.fixture(scope="module")
def base():
    return make_base()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("training"))


BROKEN = {
    '{"image": "gone.png", "caption": "a person"}': "gone.png",
    '{"image": "0.png"}': "caption",
    '{"image": "0.png", "caption": "a cat"}': "neither <person> nor the word person",
    '{"image": "0.png", "caption": "a person", "box": [5, 5, 5, 9]}': "box .* is empty or outside",
    '{"image": "0.png", "caption": "a person", "box": "all"}': "is not .left, top",
    '{"image": "0.png", "caption": "a person", "crop": "gone.png"}': "gone.png",
    '{"image": "0.png", "caption": "a person", "crop": 5}': "crop 5 is no name of a file",
    '{"image": "0.png", "caption": "a person", "box": [0, 0, 9, 9], "crop": "0.png"}': "by a box and by a crop",
    '{"image": "0.png", "caption": "a person", "boxes": []}': "unknown keys boxes",
    '{"image": "text.png", "caption": "a person"}': "text.png",
    '{"image": "0.png", "caption": ': "line 11",
    '"0.png"': "expected an object",
    '{"image": "0.png", "caption": "a person \\ud83d"}': "surrogates not allowed",
    "[" * 10**5: "recursion",
    '{"image": "huge.png", "caption": "a person"}': "13000 x 13000 pixels is too large",
    '{"image": "line.png", "caption": "a person"}': "300 x 1 pixels is too narrow",
    '{"image": "drawing.png", "caption": "a person"}': "cannot identify image file",
}


def test_every_kind_of_broken_entry_is_named(folder, tmp_path, caplog):
    save_picture(tmp_path / "0.png", 0)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "drawing.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # for which programs run
    Image.new("1", (13000, 13000)).save(tmp_path / "huge.png")
    Image.new("L", (300, 1)).save(tmp_path / "line.png")
    good = '{"image": "0.png", "caption": "A Person reads", "box": [2, 3, 20, 30]}'
    data = tmp_path / "data.jsonl"
    data.write_bytes("\n".join([*BROKEN, good, ""]).encode() + b'{"image": "0.png", "caption": "\xff"}\n')
    config = settings(tmp_path, data=str(data), on_error="skip")
    troubles = Troubles("skip")
    [entry] = read_dataset(config, troubles)
    assert (entry.caption, entry.box, entry.size) == ("A <person> reads", (2, 3, 20, 30), (48, 40))
    assert troubles.count == len(BROKEN) + 1
    for i, problem in enumerate(BROKEN.values()):
        with pytest.raises(TrainingError, match=problem):
            data.write_text(list(BROKEN)[i] if i != 10 else "\n" * 10 + list(BROKEN)[i])
            read_dataset(config, Troubles("stop"))
    with pytest.raises(TrainingError, match="no usable entry"):
        read_dataset(config, Troubles("skip"))


def test_what_makes_it_other_data(tmp_path):
    """Else a training would go on with it and not say so."""

    def named(*changes):
        lines = [{"image": f"{i}.png", "caption": "a person"} for i in range(2)]
        for i, change in enumerate(changes):
            lines[i] |= change
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, lines)))
        config = settings(tmp_path, data=str(data))
        return make_reader(read_dataset(config, Troubles("stop")), config).fingerprint

    for i in range(3):
        save_picture(tmp_path / f"{i}.png", i)
    changes = (
        {"image": "2.png"},
        {"caption": "a glad person"},
        {"box": [0, 0, 9, 9]},
        {"crop": "1.png"},
        {"crop": "2.png"},
    )
    assert len({named(), *map(named, changes), named({}, {"crop": "1.png"})} - {None}) == 7
    assert named() == named() and named({"crop": "1.png"}) == named({"crop": "1.png"})


@pytest.mark.parametrize(
    "exif",
    [
        [(0x0112, 2, b"6\0\0\0")],  # an orientation in letters
        [(0x0100, 2, b"80\0\0"), (0x0112, 3, struct.pack("<HH", 6, 0))],  # a width in letters
    ],
)
def test_odd_exif_is_a_broken_picture_at_most(tmp_path, exif):
    entries = b"".join(struct.pack("<HHI", tag, kind, 1 if kind == 3 else 2) + value for tag, kind, value in exif)
    data = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(exif)) + entries + bytes(4)
    Image.new("RGB", (80, 40)).save(tmp_path / "odd.jpg", exif=data)
    for read in (picture_size, read_picture):
        try:
            read(tmp_path / "odd.jpg")
        except (OSError, ValueError) as error:  # what names an entry and leaves it out
            print(error)


def test_what_is_held_out_is_not_trained_on(folder):
    config = settings(folder, holdout=1)
    entries = read_dataset(config, Troubles("stop"))
    trained, held = split(entries, config)
    assert len(held) == 1 and held[0] not in trained and {*trained, *held} == {*entries}


def test_a_box_is_cut_from_its_picture(tmp_path):
    """Left, top, right and bottom, of the picture as it is displayed: here the file lies on its side."""
    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shown = pixels.flip(0).transpose(0, 1)  # orientation 6: a quarter turn clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels.numpy()).save(tmp_path / "0.png", exif=exif)
    (tmp_path / "data.jsonl").write_text('{"image": "0.png", "caption": "a person", "box": [5, 10.2, 30, 49.8]}')
    config = settings(tmp_path, data=str(tmp_path / "data.jsonl"))
    [entry] = read_dataset(config, Troubles("stop"))
    assert entry.size == picture_size(tmp_path / "0.png") == (40, 60)
    sample = make_reader([entry], config)(Row(0, (32, 32), 0))
    torch.testing.assert_close(sample.crop[0], shown[10:50, 5:30] / 255)
    assert sample.size == (40, 60) and torch.equal(sample.picture, cover(shown[None] / 255, (32, 32)))


def test_a_box_in_the_last_half_pixel():
    assert cut(Image.new("RGB", (100, 40)), (99.6, 39.7, 100, 40)).size == (1, 1)


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def test_an_orientation_that_is_none_turns_nothing(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "odd.jpg", exif=EXIF.replace(b"\x01\0\x06", b"\x01\0\x09"))
    assert picture_size(tmp_path / "odd.jpg") == (40, 20) and read_picture(tmp_path / "odd.jpg").shape == (1, 20, 40, 3)


@pytest.mark.parametrize("kind", ["jpg", "tiff", "webp", "eXIf", "text", "XMP"])
def test_pictures_that_lie_on_their_side(tmp_path, kind):
    """The header's size, which bucket and box are of, is that of the picture which is read."""
    facts, picture = PngImagePlugin.PngInfo(), Image.new("RGB", (40, 20))
    if kind == "text":  # as ImageMagick writes it
        facts.add_text("Raw profile type exif", f"\nexif\n{len(EXIF):8}\n{EXIF.hex()}\n")
    if kind == "XMP":
        facts.add_itxt("XML:com.adobe.xmp", XMP)
    path = tmp_path / f"lying.{kind if kind in ('jpg', 'tiff', 'webp') else 'png'}"
    turned = {} if kind in ("text", "XMP") else {"exif": EXIF}
    picture.save(path, **({"pnginfo": facts} if path.suffix == ".png" else {}), **turned)
    assert picture_size(path) == (20, 40) and read_picture(path).shape == (1, 40, 20, 3)


def test_an_orientation_after_the_pixels_is_named(tmp_path):
    """Which only reading all of each picture would find in time."""
    make_data(tmp_path, count=2)
    path = tmp_path / "data" / "1.png"
    data, chunk = path.read_bytes(), b"eXIf" + EXIF[6:]
    end = data.index(b"IEND") - 4
    path.write_bytes(
        data[:end] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", crc32(chunk)) + data[end:]
    )
    reader = make_reader(read_dataset(settings(tmp_path), Troubles("stop")), settings(tmp_path))
    with pytest.raises(TrainingError, match="1.png: it is 40 x 48 pixels, not 48 x 40 as .*: save it anew"):
        [samples_of(reader, number) for number in range(3)]


def test_crops_of_other_case_and_of_nobody(tmp_path, caplog):
    """Else the adapter would learn from whole pictures, and nobody know; names differ where the file system's do."""
    make_data(tmp_path, count=2)
    data = tmp_path / "data"
    for name in ("0.Subject.PNG", "1.subject.2.png", "o1.subject.png", "aB.png", "Ab.png", "Ab.subject.png"):
        save_picture(data / name, 9, size=(16, 24))
    for name in ("aB.txt", "Ab.txt"):
        (data / name).write_text("a person")
    entries = read_dataset(settings(tmp_path), Troubles("stop"))
    crops = {e.image.name: e.crop and e.crop.name for e in entries}
    expected = {"0.png": "0.Subject.PNG", "1.png": None, "aB.png": None, "Ab.png": "Ab.subject.png"}
    assert crops == ({**expected, "aB.png": "Ab.subject.png"} if (data / "ab.PNG").exists() else expected)
    assert "stands beside 2 crops of subjects, such as 1.subject.2.png." in caplog.text


def test_captions_that_are_not_utf_8_are_named(tmp_path):
    make_data(tmp_path, count=1)
    caption = tmp_path / "data" / "0.txt"
    for encoding in ("cp1252", "utf-16"):
        caption.write_text("a person with a café", encoding=encoding)
        with pytest.raises(TrainingError, match="0.png: 0.txt is not text in UTF-8 .byte .*: save it as such"):
            read_dataset(settings(tmp_path), Troubles("stop"))


def test_photos_of_a_camera_are_made_smaller_first(tmp_path):
    """By a whole number, and to no less than twice what is trained on: what comes out is nearly the same."""
    make_data(tmp_path, count=1)
    save_picture(tmp_path / "data" / "0.png", 0, size=(400, 320))
    config = settings(tmp_path, buckets=False)
    reader = make_reader(read_dataset(config, Troubles("stop")), config)
    [sample, *_] = samples_of(reader)
    image = Image.open(tmp_path / "data" / "0.png")
    sizes = [reduced(image, (side, side)).size for side in (32, 80, 81, 400)]
    assert sizes == [(80, 64), (200, 160), (400, 320), (400, 320)]
    whole = cover(read_picture(tmp_path / "data" / "0.png"), (32, 32))
    torch.testing.assert_close(sample.picture, whole, rtol=0, atol=0.06)
    assert sample.crop.shape == (1, 320, 400, 3) and sample.size == (400, 320)


def test_what_is_no_data_set(tmp_path):
    for name in ("pictures.csv", "pictures.tgz"):
        (tmp_path / name).write_text("a,b")
        with pytest.raises(TrainingError, match="expected a folder of pictures, a .jsonl file, or .tar shards"):
            read_dataset(settings(tmp_path, data=str(tmp_path / name)), Troubles("skip"))


def test_sixteen_bits_are_not_white(tmp_path):
    ramp = torch.arange(0, 65536, 256, dtype=torch.int32).reshape(16, 16)
    Image.fromarray(ramp.numpy().astype("uint16")).save(tmp_path / "ramp.png")
    picture = read_picture(tmp_path / "ramp.png")
    torch.testing.assert_close(picture[0, ..., 0], ramp / 65535, rtol=0, atol=0.005)


def test_files_with_a_byte_order_mark(tmp_path):
    """As Windows' editors write them."""
    save_picture(tmp_path / "0.png", 0)
    (tmp_path / "0.txt").write_text("a <person>", encoding="utf-8-sig")
    [entry] = read_dataset(settings(tmp_path, data=str(tmp_path)), Troubles("stop"))
    assert entry.caption == "a <person>"
    (tmp_path / "a.json").write_text('{"data": "d", "output": "o"}', encoding="utf-8-sig")
    assert from_arguments(["--config", str(tmp_path / "a.json")]).data == "d"


def test_broken_files_in_a_folder(tmp_path, caplog):
    make_data(tmp_path, count=3)
    data = tmp_path / "data"
    save_picture(data / "alone.png", 5)
    (data / "1.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("7.txt", "8.txt"):
        (data / name).write_text("a <person> without a picture")
    (data / "2.png").write_bytes((data / "2.png").read_bytes()[:-40])  # its header is whole
    save_picture(data / "0.subject.png", 9, size=(16, 24))
    for left in ("__MACOSX/._0.png", "._0.png", ".ipynb_checkpoints/0-checkpoint.png"):  # no pictures, and not counted
        (data / left).parent.mkdir(exist_ok=True)
        (data / left).write_bytes(b"Mac OS X")
    config = settings(tmp_path, on_error="skip")
    troubles = Troubles("skip")
    entries = read_dataset(config, troubles)
    assert [e.image.name for e in entries] == ["0.png", "2.png"] and troubles.count == 2
    assert "alone.png: no caption beside it (expected alone.txt)" in caplog.text
    assert "stands beside 2 .txt files, such as 7.txt." in caplog.text
    reader = make_reader(entries, config)
    read = [s for number in range(3) for s in samples_of(reader, number)]
    assert {s.row.entry for s in read} == {0} and reader.troubles.count == 1 and "2.png" in caplog.text
    assert read[0].crop.shape == (1, 24, 16, 3) and read[0].picture.shape[1:3] == read[0].row.bucket[::-1]
    with pytest.raises(TrainingError, match="2.png"):
        strict = make_reader(entries, settings(tmp_path))
        [samples_of(strict, number) for number in range(3)]


def test_folders_that_links_lead_to(tmp_path, caplog):
    """Each is read once, though one leads back to what holds it; one that cannot be read is named."""
    for i, folder in enumerate(("data", "elsewhere/deep")):
        (tmp_path / folder).mkdir(parents=True)
        save_picture(tmp_path / folder / f"{i}.png", i)
    links = {"data/all": "elsewhere", "data/again": "elsewhere/deep", "elsewhere/round": "data"}
    try:
        for link, target in links.items():
            (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert [path.name for path in files_of(tmp_path / "data", (".png",))] == ["0.png", "1.png"]
    assert not files_of(tmp_path / "gone", (".png",)) and "gone" in caplog.text


def test_a_broken_picture_alone_in_its_bucket(base, tmp_path, caplog):
    """Also where it is the one to validate on."""
    make_data(tmp_path, count=3)
    broken = tmp_path / "data" / "2.png"
    save_picture(broken, 2, size=(80, 40))
    broken.write_bytes(broken.read_bytes()[:-40])
    common = {"on_error": "skip", "batch": 1}
    entries = read_dataset(settings(tmp_path), Troubles("stop"))
    apart = (settings(tmp_path, holdout=1, output=str(tmp_path / "apart"), seed=i, **common) for i in range(20))
    for config in (
        settings(tmp_path, **common),
        next(config for config in apart if split(entries, config)[1][0].image == broken),
    ):
        assert train(config, base) and "2.png" in caplog.text
        caplog.clear()


def test_what_chance_does_to_a_sample(tmp_path):
    """To the crop, the caption and the subject as often as is asked for, and to the picture nothing."""
    make_data(tmp_path, count=1)
    entries = read_dataset(settings(tmp_path), Troubles("stop"))
    rows = [Row(0, (32, 32), seed) for seed in range(40)]

    def drawn(**changes):
        return [make_reader(entries, settings(tmp_path, **changes))(row) for row in rows]

    plain = drawn()
    assert {sample.caption for sample in plain} == {"a <person> in a park"} and all(sample.subject for sample in plain)
    assert all(torch.equal(sample.crop, plain[0].crop) for sample in plain)
    for share, expected in ((0.5, {True, False}), (1.0, {True})):
        assert {sample.caption == "<person>" for sample in drawn(caption_dropout=share)} == expected
        assert {not sample.subject for sample in drawn(subject_dropout=share)} == expected
    varied, again = drawn(augment=1.0), drawn(augment=1.0)
    for a, b, sample in zip(varied, again, plain, strict=True):
        assert torch.equal(a.crop, b.crop) and torch.equal(a.picture, sample.picture)
    assert len({tuple(sample.crop.flatten().tolist()) for sample in [*varied, plain[0]]}) == len(rows) + 1


def test_half_of_the_crops_are_mirrored():
    picture = torch.rand(1, 20, 30, 3)
    seen = [vary(picture, 1e-6, torch.Generator().manual_seed(seed)) for seed in range(20)]
    ways = [[torch.allclose(crop, way, atol=1e-3) for way in (picture, picture.flip(2))] for crop in seen]
    assert all(sum(way) == 1 for way in ways) and 4 < sum(way[1] for way in ways) < 16


def test_pictures_of_any_kind(tmp_path):
    from nested_attention.training.pictures import SUFFIXES, at_most

    modes = {"L": 3, "RGB": 3, "RGBA": 4, "P": 3, "LA": 4, "CMYK": 3}
    kinds = [(mode, "jpg" if mode == "CMYK" else "png", channels) for mode, channels in modes.items()]
    kinds += [("P", "gif", 3), ("RGBA", "tiff", 4), ("CMYK", "tif", 3), ("RGB", "webp", 3), ("RGB", "bmp", 3)]
    for mode, suffix, channels in kinds:
        assert f".{suffix}" in SUFFIXES
        path = tmp_path / f"{mode}.{suffix}"
        Image.new(mode, (30, 20)).save(path)
        picture = read_picture(path)
        assert picture.shape == (1, 20, 30, channels) and picture_size(path) == (30, 20)
        assert cover(picture, (16, 24)).shape == (1, 24, 16, channels)
        assert at_most(picture, 15).shape == (1, 10, 15, channels) and at_most(picture, 30) is picture
        varied = vary(picture, 1.0, torch.Generator().manual_seed(0))
        assert varied.shape == picture.shape and 0 <= varied.min() <= varied.max() <= 1
    picture = torch.rand(1, 20, 30, 3)
    assert torch.allclose(vary(picture, 0.0, torch.Generator().manual_seed(0)), picture, atol=1e-5)
