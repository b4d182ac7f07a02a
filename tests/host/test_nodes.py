"""The nodes as the host loads them: their promises to saved workflows, and a whole graph of them."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import folder_paths
import pytest
import torch
from sampling import encode, sample
from small_models import make_adapter, make_clip_vision

ROOT = Path(__file__).parents[2]

PROMISES = {
    "NestedAttentionLoadAdapter": ("adapter_name feature_layer norm", "NESTED_ADAPTER"),
    "NestedAttentionEncodeSubject": ("adapter clip_vision image fit images mask", "NESTED_SUBJECT IMAGE"),
    "NestedAttentionApplySubject": (
        "model clip subject placeholder class_word strength token_weight start_percent end_percent region low_memory",
        "MODEL CLIP",
    ),
    "NestedAttentionCombineSubjects": ("subject_a subject_b mode weight", "NESTED_SUBJECT"),
    "NestedAttentionPromptInfo": ("clip text", "STRING"),
    "NestedAttentionSaveSubject": ("subject filename_prefix", ""),
    "NestedAttentionLoadSubject": ("subject_name adapter", "NESTED_SUBJECT"),
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Node classes by id, from the pack imported as the host imports it: by path, under a name of its own."""
    models = tmp_path_factory.mktemp("models")
    folder_paths.folder_names_and_paths["nested_attention"] = ([str(models / "mine")], set())
    original, folder_paths.models_dir = folder_paths.models_dir, str(models)
    spec = importlib.util.spec_from_file_location("pack under test", ROOT / "__init__.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def load():
        extension = await module.comfy_entrypoint()
        await extension.on_load()
        return {node.define_schema().node_id: node for node in await extension.get_node_list()}

    yield asyncio.run(load())
    folder_paths.models_dir = original


def run(node, **inputs):
    return node.execute(**inputs).result


def test_ids_inputs_and_outputs(pack):
    assert pack.keys() == PROMISES.keys()
    for name, (inputs, outputs) in PROMISES.items():
        schema = pack[name].define_schema()
        assert " ".join(i.id for i in schema.inputs) == inputs
        assert " ".join(o.io_type for o in schema.outputs) == outputs


def test_every_input_is_explained(pack):
    for node in pack.values():
        schema = node.define_schema()
        assert schema.description and schema.display_name and schema.category
        for each in schema.inputs:
            assert each.tooltip and len(each.tooltip) > 20, (schema.node_id, each.id)


def test_every_node_has_its_help_and_no_help_is_left_over(pack):
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == pack.keys()
    for name, node in pack.items():
        text = (ROOT / "web" / "docs" / f"{name}.md").read_text()
        assert text.startswith(f"# {node.define_schema().display_name}\n")


def test_folders_of_extra_model_paths_stay(pack):
    paths, extensions = folder_paths.folder_names_and_paths["nested_attention"]
    assert [Path(p).name for p in paths] == ["mine", "nested_attention"]
    assert ".safetensors" in extensions and ".ckpt" not in extensions and ".pkl" not in extensions


def test_no_file_says_where_to_put_one(pack):
    node = pack["NestedAttentionLoadAdapter"]
    assert node.define_schema().inputs[0].options == ["(none in models/nested_attention)"]
    with pytest.raises(ValueError, match="no file 'x.safetensors'. Put it into .*nested_attention"):
        run(node, adapter_name="x.safetensors", feature_layer="adapter's own", norm="adapter's own")


@pytest.fixture(scope="module")
def adapter(pack, sites):
    folder = Path(folder_paths.get_folder_paths("nested_attention")[0])
    folder.mkdir()
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
    pack["NestedAttentionApplySubject"].hidden = type("Hidden", (), {"unique_id": "7"})
    model, clip = run(
        pack["NestedAttentionApplySubject"], model=base_model, clip=base_clip, subject=subject, **defaults
    )
    positive, negative = encode(clip, "a <person> in a park"), encode(clip, "bad")
    assert not torch.allclose(sample(model, positive, negative), sample(base_model, positive, negative))


def test_photos_of_one_subject(pack, adapter):
    one = encode_subject(pack, adapter)[0].subject.tokens
    many = encode_subject(pack, adapter, photos=3)[0].subject.tokens
    mean = encode_subject(pack, adapter, photos=3, images="average")[0].subject.tokens
    assert (one.shape[1], many.shape[1], mean.shape[1]) == (12, 36, 12)


def test_combine(pack, adapter):
    a, b = (encode_subject(pack, adapter)[0] for _ in range(2))
    (both,) = run(pack["NestedAttentionCombineSubjects"], subject_a=a, subject_b=b, mode="blend", weight=0.25)
    torch.testing.assert_close(both.subject.tokens, 0.75 * a.subject.tokens + 0.25 * b.subject.tokens)
    assert both.adapter is a.adapter


def test_save_and_load(pack, adapter):
    subject, _ = encode_subject(pack, adapter)
    saved = [
        pack["NestedAttentionSaveSubject"].execute(subject=subject, filename_prefix="friends/anna").ui.value
        for _ in range(2)
    ]
    assert saved == [f"Saved as {Path('friends', f'anna_0000{i}_.safetensors')}" for i in (1, 2)]
    load = pack["NestedAttentionLoadSubject"]
    name = str(Path("friends", "anna_00001_.safetensors"))
    assert name in load.define_schema().inputs[0].options
    for given in ({}, {"adapter": adapter}):
        (loaded,) = run(load, subject_name=name, **given)
        assert torch.equal(loaded.subject.tokens, subject.subject.tokens)
        assert loaded.adapter.fingerprint == adapter.fingerprint


def test_a_changed_file_is_read_again(pack, adapter):
    node = pack["NestedAttentionLoadAdapter"]
    before = node.fingerprint_inputs(adapter_name="person.safetensors", feature_layer="", norm="")
    path = Path(folder_paths.get_full_path("nested_attention", "person.safetensors"))
    path.touch()
    assert node.fingerprint_inputs(adapter_name="person.safetensors", feature_layer="", norm="") != before
