"""The nodes as the host loads them: what becomes of their inputs, and a whole graph of them."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy_api.latest._io import Hidden, HiddenHolder
from comfy_extras.nodes_mediapipe import FaceLandmarksType
from sampling import encode, sample
from small_models import make_adapter, make_clip_vision
from small_training import make_base, make_data


def handed_on_by_train(
    images, captions, crops, model, clip, vae, clip_vision, tokens, preview_every, preview_prompt, adapter, **same
):
    same = {name: value for name, value in same.items() if name not in ("name", "dataset")}  # a test of their own
    previews = {"validate_every": preview_every, "validation_prompts": (preview_prompt,)}
    return {
        "store_pictures": {"images": images, "captions": [captions], "crops": crops},
        "TrainingConfig": {"queries": tokens, "start_from": adapter.name, **previews, **same},
        "Base": {"model": model, "clip": clip, "vae": vae, "clip_vision": clip_vision},
        "train_in_graph": {"start": adapter, "node_id": "7"},
    }


# What a node's inputs become below it: functions that its module calls, in order, and what they are given. `same` are
# inputs that keep their names.
HANDED_ON = {
    "NestedAttentionLoadAdapter": lambda adapter_name, **same: {"load_adapter": {"name": adapter_name, **same}},
    "NestedAttentionEncodeSubject": lambda adapter, clip_vision, image, fit, images, mask: {
        "encode": {"clip_vision": clip_vision, "images": image, "mask": mask, "how": fit, "config": adapter.config},
        "subject_of": {"adapter": adapter, "photos": images},
    },
    "NestedAttentionApplySubject": lambda subject, **same: {
        "apply_subject": {"bound": subject, "node_id": "7", **same}
    },
    "NestedAttentionAlignFace": lambda image, face_landmarks, without_face, **same: {
        "find_faces": {"images": image, "landmarks": face_landmarks, **same}
    },
    "NestedAttentionCropSubject": lambda image, mask, x, y, width, height, **same: {
        "area_of": {"mask": mask[0], "box": (x, y, width, height)},
        "cut": {"image": image[0], **same},
    },
    "NestedAttentionCombineSubjects": lambda subject_a, subject_b, **same: {
        "combine": {"a": subject_a.subject, "b": subject_b.subject, **same}
    },
    "NestedAttentionRecord": lambda limit_mb, **same: {
        "record_model": {"limit": limit_mb << 20, "node_id": "7", **same}
    },
    "NestedAttentionInspect": lambda record, subject, points, photo, view, **same: {
        "inspect": {"recording": record, "bound": subject, "points": [(0.1, 0.2)], "photos": photo, **same}
    },
    "NestedAttentionPromptInfo": lambda **same: {"describe_prompt": same},
    "NestedAttentionTrain": handed_on_by_train,
}


def run(node, **inputs):
    node.hidden = HiddenHolder.from_dict({Hidden.unique_id: "7"})
    return node.execute(**inputs).result


def said(node, **inputs):
    """What a node says of itself, to its own text and in the history."""
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr(sys.modules[node.__module__], "show", lambda *text: shown.append(text))
        node.hidden = HiddenHolder.from_dict({Hidden.unique_id: "7"})
        report = node.execute(**inputs).ui.value
    assert shown == [(report, "7")]
    return report


def test_folders_of_extra_model_paths_stay(pack):
    paths, extensions = folder_paths.folder_names_and_paths["nested_attention"]
    assert [Path(p).name for p in paths] == ["mine", "nested_attention", "adapters"]  # the last are the pack's own
    assert ".safetensors" in extensions and ".ckpt" not in extensions and ".pkl" not in extensions


def test_the_adapters_of_the_small_model_are_in_the_list(pack):
    options = pack["NestedAttentionLoadAdapter"].define_schema().inputs[0].options
    assert {"studio_person.safetensors", "studio_pet.safetensors"} <= set(options)


def test_no_file_says_where_to_put_one(pack, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "nested_attention_subjects", ([str(tmp_path)], set()))
    node = pack["NestedAttentionLoadSubject"]
    assert node.define_schema().inputs[0].options == ["(none in models/nested_attention_subjects)"]
    with pytest.raises(ValueError, match="no file 'x.safetensors'. Put it into .*nested_attention"):
        own = "adapter's own"
        run(pack["NestedAttentionLoadAdapter"], adapter_name="x.safetensors", feature_layer=own, norm=own)


@pytest.fixture(scope="module")
def adapter(pack, sites):
    folder = Path(folder_paths.get_folder_paths("nested_attention")[0])
    folder.mkdir(exist_ok=True)
    make_adapter(folder / "person.safetensors", sites)
    choices = {"feature_layer": "adapter's own", "norm": "adapter's own"}
    (adapter,) = run(pack["NestedAttentionLoadAdapter"], adapter_name="person.safetensors", **choices)
    return adapter


def encode_subject(pack, adapter, photos=1, **changes):
    inputs = {"clip_vision": make_clip_vision(), "image": torch.rand(photos, 50, 40, 3), "fit": "center crop"}
    return run(pack["NestedAttentionEncodeSubject"], adapter=adapter, **{**inputs, "images": "concatenate", **changes})


def test_from_photo_to_picture(pack, adapter, base_model, base_clip):
    subject, seen = encode_subject(pack, adapter)
    assert seen.shape == (1, 32, 32, 3)
    schema = pack["NestedAttentionApplySubject"].define_schema()
    defaults = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    inputs = {**defaults, "placeholder": " <person> ", "class_word": " ", "subject": subject}
    model, clip = run(pack["NestedAttentionApplySubject"], model=base_model, clip=base_clip, **inputs)
    positive, negative = encode(clip, "a <person> in a park"), encode(clip, "bad")
    assert not torch.allclose(sample(model, positive, negative), sample(base_model, positive, negative))


def test_photos_of_one_subject(pack, adapter):
    one = encode_subject(pack, adapter)[0].subject.tokens
    many = encode_subject(pack, adapter, photos=3)[0].subject.tokens
    mean = encode_subject(pack, adapter, photos=3, images="average")[0].subject.tokens
    assert (one.shape[1], many.shape[1], mean.shape[1]) == (12, 36, 12)


def test_a_mask_of_another_photo_is_said(pack, adapter, caplog):
    encode_subject(pack, adapter, mask=torch.ones(1, 90, 40))
    assert "The mask is of another shape than the image" in caplog.text


@pytest.fixture
def preview(pack, tmp_path):
    """A node as the host readies it for a run, by id; its previews go to a folder of the test."""
    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path))

    def ready(node_id):
        pack[node_id].hidden = HiddenHolder.from_dict({})
        return pack[node_id]

    yield ready
    folder_paths.set_temp_directory(before)


def test_align_face(preview, caplog, monkeypatch):
    """What happens where there is no face is the user's choice, and is said."""
    node = preview("NestedAttentionAlignFace")
    assert node.define_schema().inputs[-1].io_type == FaceLandmarksType.io_type
    nobody = {"frames": [[], []], "image_size": (60, 50), "connection_sets": {}}
    inputs = {"image": torch.rand(2, 60, 50, 3), "order": "largest first", "index": 0, "points": ""}
    shown = []
    monkeypatch.setattr(sys.modules[node.__module__], "show", lambda text, node_id: shown.append(text))
    with pytest.raises(ValueError, match="Photo 1, 2 of 2 has no face 0"):
        run(node, **inputs, without_face="error", face_landmarks=nobody)
    assert torch.equal(run(node, **inputs, without_face="whole image", face_landmarks=nobody)[0], inputs["image"])
    assert "No face was found in photo 1, 2 of 2" in caplog.text
    mesh = torch.rand(478, 2).numpy() * 20 + 10
    nobody["frames"][1] = [{"landmarks_xy": mesh, "bbox_xyxy": [10, 10, 30, 30]}]
    (mixed,) = run(node, **inputs, without_face="whole image", face_landmarks=nobody)
    assert mixed.shape == (2, 512, 512, 3)
    assert (mixed[0, :, :20] - 0.5).abs().max() < 0.01  # all of the photo, on grey
    with pytest.raises(ValueError, match="Photo 1 of 2 has no face 0"):
        run(node, **inputs, without_face="error", face_landmarks=nobody)
    assert not shown
    points = {**inputs, "points": "10 10 30 10 20 20 12 30 28 30 " * 2}
    output = node.execute(**points, without_face="error")
    assert output.result[0].shape == (2, 512, 512, 3) and len(output.ui.as_dict()["images"]) == 2
    assert shown == ["2 of 2 photos aligned."]
    rounded = inputs["image"].half()  # as the host hands pictures on under --fp16-intermediates
    exact, of_rounded = (
        run(node, **{**points, "image": x}, without_face="error")[0] for x in (rounded.float(), rounded)
    )
    assert torch.equal(exact, of_rounded)


def test_crop_subject(preview, caplog):
    node = preview("NestedAttentionCropSubject")
    inputs = {"image": torch.rand(2, 60, 50, 4), "margin": 0.0, "background": "keep"}
    none = dict.fromkeys(("x", "y", "width", "height"), 0)
    box = {"x": 5, "y": 10, "width": 20, "height": 10}
    output = node.execute(**inputs, **box, square=False)
    assert output.result[0].shape == (2, 10, 20, 3) and len(output.ui.as_dict()["images"]) == 2
    masks = torch.zeros(2, 60, 50)
    masks[0, 10:20, 5:25] = masks[1, 30:40, 10:40] = 1
    assert run(node, **inputs, **none, square=True, mask=masks)[0].shape == (2, 30, 30, 3)
    (white,) = run(node, **{**inputs, "background": "white"}, **none, square=False, mask=masks)
    assert white.shape == (2, 10, 30, 3) and (white[0, :, :5] == 1).all() and (white[0, :, 25:] == 1).all()
    with pytest.raises(ValueError, match="The mask is empty"):
        run(node, **inputs, **none, square=True, mask=masks * 0)
    run(node, **inputs, **none, square=True, mask=torch.ones(1, 90, 50))
    assert "The mask is of another shape than the image" in caplog.text


class Reached(Exception):
    """What a node is for would begin."""


@pytest.mark.parametrize("option", [-2, -1])
@pytest.mark.parametrize("name", HANDED_ON)
def test_every_input_arrives(pack, adapter, name, option, monkeypatch, tmp_path):
    """No two numbers or texts are alike, and of what can be chosen one option and another are tried."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node, called = pack[name], {}
    monkeypatch.setattr(node, "hidden", HiddenHolder.from_dict({Hidden.unique_id: "7"}), raising=False)
    chosen = {"adapter": adapter, "adapter_name": "person.safetensors", "points": "0.1,0.2"}
    chosen |= {each: SimpleNamespace(subject=object()) for each in ("subject_a", "subject_b")}
    chosen |= {"record": SimpleNamespace(require_run=lambda *_: None)}
    chosen |= {"dataset": "", "preview_prompt": "a class_word"}
    kinds = {
        "COMBO": lambda widget, i: widget.options[option],
        "BOOLEAN": lambda widget, i: option == -1,
        "INT": lambda widget, i: 8 * i,
        "FLOAT": lambda widget, i: i / 64,
        "STRING": lambda widget, i: widget.id,
        "IMAGE": lambda socket, i: torch.rand(1, 128, 128, 3),
        "MASK": lambda socket, i: torch.ones(1, 128, 128),
        "CLIP_VISION": lambda socket, i: make_clip_vision(),
    }
    inputs = {
        each.id: chosen[each.id] if each.id in chosen else kinds.get(each.io_type, lambda *_: object())(each, i)
        for i, each in enumerate(node.define_schema().inputs, 1)
    }
    expected = HANDED_ON[name](**inputs)

    def listening(name, function):
        def listen(*args, **kwargs):
            signature = inspect.signature(function)
            given = signature.bind(*args, **kwargs).arguments
            others = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
            called[name] = {**given, **(given[others[0]] if others else {})}
            if name == [*expected][-1]:
                raise Reached
            return function(*args, **kwargs)

        return listen

    module = sys.modules[node.__module__]
    for function in expected:
        monkeypatch.setattr(module, function, listening(function, getattr(module, function)))
    with pytest.raises(Reached):
        node.execute(**inputs)
    for function, arguments in expected.items():
        for argument, value in arguments.items():
            given = called[function][argument]
            same = torch.equal(given, value) if isinstance(value, torch.Tensor) else given == value
            assert same, (function, argument, given, value)


def test_combine(pack, adapter):
    a, b = (encode_subject(pack, adapter)[0] for _ in range(2))
    (both,) = run(pack["NestedAttentionCombineSubjects"], subject_a=a, subject_b=b, mode="blend", weight=0.25)
    torch.testing.assert_close(both.subject.tokens, 0.75 * a.subject.tokens + 0.25 * b.subject.tokens)
    assert both.adapter is a.adapter


def test_save_and_load(pack, adapter):
    subject, _ = encode_subject(pack, adapter)
    save = pack["NestedAttentionSaveSubject"]
    saved = [said(save, subject=subject, filename_prefix=f"friends/anna{end}") for end in ("", "/")]
    assert saved == [f"Saved as {Path('friends', f'anna_0000{i}_.safetensors')}" for i in (1, 2)]
    for empty in ("", " ", "./"):
        with pytest.raises(ValueError, match="The file has no name"):
            save.execute(subject=subject, filename_prefix=empty)
    for empty in ("friends/..", ". "):
        with pytest.raises(ValueError, match="The file has no name"):
            save.execute(subject=subject, filename_prefix=empty)
    for outside in ("../anna", "friends/../../anna", "/anna", "..\\anna"):
        with pytest.raises(ValueError, match="leads out of models/nested_attention_subjects"):
            save.execute(subject=subject, filename_prefix=outside)
    load = pack["NestedAttentionLoadSubject"]
    name = str(Path("friends", "anna_00001_.safetensors"))
    assert name in load.define_schema().inputs[0].options
    for given in ({}, {"adapter": adapter}):
        (loaded,) = run(load, subject_name=name, **given)
        assert torch.equal(loaded.subject.tokens, subject.subject.tokens)
        assert loaded.adapter.fingerprint == adapter.fingerprint and (loaded.adapter is adapter) is bool(given)
    file = Path(folder_paths.get_full_path("nested_attention", adapter.name))
    file.rename(renamed := file.with_name("another.safetensors"))
    with pytest.raises(ValueError, match=f"'{adapter.name}', is not in models/nested_attention.*another name now"):
        run(load, subject_name=name)
    renamed.rename(file)


def test_a_subject_that_is_not_the_adapters_is_refused(pack, adapter):
    subject, _ = encode_subject(pack, adapter)
    narrow = replace(subject, subject=replace(subject.subject, tokens=subject.subject.tokens[..., :8]))
    for given, other, problem in (
        (subject, replace(adapter, fingerprint="f2"), "made by another adapter .*fingerprint f2"),
        (narrow, adapter, "tokens are 8 wide, those of its adapter 96"),
    ):
        shown = said(pack["NestedAttentionSaveSubject"], subject=given, filename_prefix="refused")
        with pytest.raises(ValueError, match=problem):
            run(pack["NestedAttentionLoadSubject"], subject_name=shown.removeprefix("Saved as "), adapter=other)


def test_a_number_that_is_taken_is_passed_over(pack, adapter, monkeypatch):
    """As the host gives it where 'Anna' and 'anna' are one file: it counts them apart."""
    subject, _ = encode_subject(pack, adapter)
    place_of = folder_paths.get_save_image_path
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *given: (*place_of(*given)[:2], 1, "", ""))
    saved = [said(pack["NestedAttentionSaveSubject"], subject=subject, filename_prefix="bo") for _ in range(3)]
    assert saved == [f"Saved as bo_0000{i}_.safetensors" for i in (1, 2, 3)]


def test_a_changed_file_is_read_again(pack, adapter):
    """A subject's adapter file also. Where a name comes through a link, the host gives none here."""
    subject, _ = encode_subject(pack, adapter)
    shown = said(pack["NestedAttentionSaveSubject"], subject=subject, filename_prefix="changed")
    load_adapter, load_subject = (pack[f"NestedAttentionLoad{kind}"] for kind in ("Adapter", "Subject"))

    def read():
        names = {"adapter_name": "person.safetensors"}, {"subject_name": shown.removeprefix("Saved as ")}
        return [n.fingerprint_inputs(**name) for n, name in zip((load_adapter, load_subject), names, strict=True)]

    before = read()
    assert read() == before
    path = Path(folder_paths.get_full_path("nested_attention", "person.safetensors"))
    path.touch()
    assert all(a != b for a, b in zip(before, read(), strict=True))
    assert load_adapter.fingerprint_inputs(adapter_name=None) == load_adapter.fingerprint_inputs(adapter_name=None)
    assert load_subject.fingerprint_inputs(subject_name=None) == load_subject.fingerprint_inputs(subject_name=None)


@pytest.fixture
def train(pack, tmp_path, monkeypatch):
    """Trains a small adapter by the node; whatever is not said has its default."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node = pack["NestedAttentionTrain"]
    node.hidden = type("Hidden", (), {"unique_id": "7"})
    base = make_base()
    parts = {"model": base.model, "clip": base.clip, "vae": base.vae, "clip_vision": base.clip_vision}
    defaults = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
    small = {"steps": 2, "tokens": 5, "resolution": 32, "dim": 64, "depth": 1, "preview_every": 0}
    return lambda **inputs: node.execute(**{**defaults, **parts, **small, **inputs})


def test_train_and_save(pack, train, tmp_path):
    images = torch.rand(2, 40, 48, 3)
    first = train(images=images, captions="a person reads\na <person>", preview_every=2)
    adapter, curve, picture = first.result
    assert adapter.config.queries == 5 and curve.shape[-1] == picture.shape[-1] == 3 and picture.shape[2] >= 64
    assert first.ui.value == "2 steps, 2 in all. The run is in output/nested_attention/person."
    run_again = train(images=images, captions="a person reads\na <person>", preview_every=2)
    assert "had all its steps" in run_again.ui.value and run_again.result[0].fingerprint == adapter.fingerprint
    further = train(images=images, crops=images, name="further", adapter=adapter, class_word="dog", steps=1)
    assert further.result[0].config.queries == 5 and further.result[2].shape == (1, 64, 64, 3)
    save = pack["NestedAttentionSaveAdapter"]
    saved = [said(save, adapter=adapter, filename_prefix="mine/person") for _ in range(2)]
    assert saved == [f"Saved as {Path('mine', f'person_0000{i}_.safetensors')}" for i in (1, 2)]
    name = str(Path("mine", "person_00002_.safetensors"))
    own = {"feature_layer": "adapter's own", "norm": "adapter's own"}
    (loaded,) = run(pack["NestedAttentionLoadAdapter"], adapter_name=name, **own)
    assert loaded.fingerprint == adapter.fingerprint and loaded.config == adapter.config


def test_train_on_a_dataset(train, tmp_path, monkeypatch):
    make_data(tmp_path / "input")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    for dataset in ("data", str(tmp_path / "input" / "data"), f'"{tmp_path / "input" / "data"}"'):
        assert train(dataset=dataset, name=str(len(dataset)), steps=1).ui.value.startswith("1 steps")


def test_train_says_what_is_wrong(train, tmp_path):
    images = torch.rand(3, 16, 16, 3)
    for inputs, problem in (
        ({}, "Connect pictures to images, or name a dataset"),
        ({"images": images, "dataset": "data"}, "one of the two, not both"),
        ({"images": images, "captions": "a person\n\na person"}, "2 captions for 3 pictures"),
        ({"images": images, "captions": "a cat"}, "neither <person> nor the word person"),
        ({"images": images, "crops": images[:1]}, "one of crops for each of images"),
        ({"images": images, "name": "../person"}, "cannot be the name of a run"),
        ({"images": images, "name": " "}, "cannot be the name of a run"),
        ({"images": images, "name": "NUL.txt"}, "on Windows none is called 'NUL.txt'"),
        ({"images": images, "name": "a\0b"}, r"leave out '\\x00'"),
        ({"images": images, "name": "<anna>"}, "cannot be the name of a file everywhere: leave out < >"),
        ({"dataset": "gone"}, "There is no data at .*gone"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=problem):
            train(**inputs)
    assert not list(tmp_path.rglob("checkpoint.pt"))
