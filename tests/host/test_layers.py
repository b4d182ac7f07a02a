"""Layers are found in the model; an adapter for another model is refused in words."""

from __future__ import annotations

import argparse

import comfy.ops
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from small_models import make_adapter, make_subject

from nested_attention.adapter import fingerprint
from nested_attention.base_models import KNOWN, describe
from nested_attention.files import build_adapter, read_tensors
from nested_attention.host.adapters import bind, load_adapter
from nested_attention.host.apply import apply_subject
from nested_attention.host.layers import cross_attention_sites

COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 64, "model_channels": 320,
}  # fmt: skip
SDXL_LIKE = {**COMMON, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "context_dim": 2048}
FAMILY = {
    "Stable Diffusion 1.5": {
        **COMMON, "num_heads": 8, "num_head_channels": -1, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1, "context_dim": 768,
    },
    "SDXL": {
        **SDXL_LIKE, "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "transformer_depth_middle": 10,
    },
    "SDXL refiner": {
        **COMMON, "model_channels": 384, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "context_dim": 1280,
        "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0], "transformer_depth_output": [0] * 3 + [4] * 6 + [0] * 3,
        "transformer_depth_middle": 4,
    },
    "SSD-1B": {
        **SDXL_LIKE, "transformer_depth": [0, 0, 2, 2, 4, 4],
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4], "transformer_depth_middle": -1,
    },
    "Segmind Vega": {
        **SDXL_LIKE, "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": -1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def family():
    with torch.device("meta"):
        return {
            name: cross_attention_sites(UNetModel(**config, operations=comfy.ops.manual_cast))
            for name, config in FAMILY.items()
        }


def test_every_unet_of_the_family(family):
    for name, sites in family.items():
        inner = [site.inner for site in sites]
        assert describe(inner, sites[0].context).startswith(f"{name} (")
        assert KNOWN[len(sites), sites[0].context] == name
        assert all(site.inner == site.heads * (site.inner // site.heads) for site in sites)


def test_order_is_that_of_adapter_files(family):
    """Down, up, mid; SD 1.5's inner widths in diffusers' order are well known."""
    assert [s.inner for s in family["Stable Diffusion 1.5"]] == [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [
        320
    ] * 3 + [1280]
    sections = [s.key[0] for s in family["SDXL"]]
    assert sections == ["input"] * 24 + ["output"] * 36 + ["middle"] * 10
    assert {s.key[1] for s in family["SDXL"] if s.key[0] == "middle"} == {0}


def test_sites_are_where_the_host_looks(applied, sites, base_model):
    """Each found key is that of a layer which the host really runs."""
    from sampling import PROMPT, encode, sample

    seen = set()
    probe = base_model.clone()
    probe.set_model_attn2_patch(lambda n, c, v, extra: seen.add((*extra["block"], extra["block_index"])) or (n, c, v))
    sample(probe, encode(applied[1], PROMPT), encode(applied[1], ""))
    assert seen == {site.key for site in sites}


@pytest.mark.parametrize(
    "layers, message",
    [
        ((320, 320), "has 2 layers, the model has 11"),
        (None, r"input block 1, transformer 0 it projects from 96 to 33, the model there from 96 to 32 \(1 of 11"),
    ],
)
def test_adapter_for_another_model(tmp_path, base_model, base_clip, sites, layers, message):
    """Of another number of layers, or of other widths."""
    layers = layers or (33, *(site.inner for site in sites[1:]))
    path = make_adapter(tmp_path / "other.safetensors", sites, layers=layers)
    adapter = load_adapter(str(path), path.name)
    with pytest.raises(ValueError, match=message) as error:
        apply_subject(base_model, base_clip, make_subject(adapter), placeholder="<person>")
    assert "'other.safetensors' was made for an unknown base model" in str(error.value)


def test_adapter_for_another_text_width(tmp_path, base_model, base_clip, sites):
    """As SD 1.5's and SD 2's are, whose layers are otherwise alike."""
    path = make_adapter(tmp_path / "other.safetensors", sites, output_dim=104)
    adapter = load_adapter(str(path), path.name)
    with pytest.raises(ValueError, match="it projects from 104 to 32, the model there from 96 to 32"):
        apply_subject(base_model, base_clip, make_subject(adapter), placeholder="<person>")


@pytest.mark.parametrize("name", ["page.safetensors", "page.bin"])
def test_unreadable_file(tmp_path, name):
    (tmp_path / name).write_text("<!DOCTYPE html><html>Please log in</html>" * 100)
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*Download it again"):
        load_adapter(str(tmp_path / name), name)


def test_a_file_with_objects_is_not_called_damaged(tmp_path):
    torch.save({"args": argparse.Namespace(), "weights": torch.zeros(2)}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt holds Python objects beside its weights"):
        load_adapter(str(tmp_path / "last.pt"), "last.pt")


def test_models_of_another_kind():
    with pytest.raises(ValueError, match="UNets of the Stable Diffusion family .* this model is a Linear"):
        cross_attention_sites(torch.nn.Linear(1, 1))


def test_subject_of_another_adapter(tmp_path, person, sites):
    path = make_adapter(tmp_path / "second.safetensors", sites, seed=9)
    second = load_adapter(str(path), path.name)
    with pytest.raises(ValueError, match="made by another adapter .'person.safetensors'.*'second.safetensors'"):
        bind(person.subject, second)


def test_hosts_that_create_no_weights_before_loading(tmp_path, sites, adapter, monkeypatch):
    """With dynamic memory management ComfyUI's layers are empty until their weights are read from the file."""
    import comfy.memory_management

    path = make_adapter(tmp_path / "adapter.safetensors", sites)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        with torch.device("meta"):
            assert comfy.ops.manual_cast.Linear(2, 2).weight is None
        lazy = build_adapter(*read_tensors(path), operations=comfy.ops.manual_cast)
    assert fingerprint(lazy.state_dict()) == adapter.fingerprint
    features = torch.randn(1, 5, 48)
    assert torch.equal(lazy.resampler(features), adapter.patcher.model.resampler(features))


def test_choices_over_the_file(tmp_path, sites):
    path = make_adapter(tmp_path / "adapter.safetensors", sites, norm="clamp", feature_layer="penultimate")
    own = load_adapter(str(path), path.name).config
    chosen = load_adapter(str(path), path.name, norm="off", feature_layer="last").config
    assert (own.norm, own.feature_layer, chosen.norm, chosen.feature_layer) == ("clamp", "penultimate", "off", "last")
