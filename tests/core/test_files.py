"""Every dialect of adapter files reads into the same adapter; what is none is refused in words."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nested_attention import files
from nested_attention.adapter import AdapterConfig, NestedAdapter, fingerprint
from nested_attention.dialects import AdapterFileError, canonical
from nested_attention.files import build_adapter, read_adapter, read_tensors, write_adapter

LAYERS = (8, 8, 16, 16, 16, 8, 24)  # down 2, up 4, mid 1
NAMES = [
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "down_blocks.0.attentions.0.transformer_blocks.1",
    "up_blocks.0.attentions.2.transformer_blocks.0",
    "up_blocks.0.attentions.10.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.2.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
]
CONFIG = AdapterConfig(
    image_dim=20, dim=64, depth=2, heads=2, dim_head=64, queries=6, output_dim=12, layers=LAYERS, ff_mult=3
)


@pytest.fixture(scope="module")
def adapter():
    torch.manual_seed(0)
    return NestedAdapter(CONFIG)


def parts(adapter):
    state = adapter.state_dict()
    resampler = {k.removeprefix("resampler."): v for k, v in state.items() if k.startswith("resampler.")}
    pairs = [(state[f"layers.{i}.to_k.weight"], state[f"layers.{i}.to_v.weight"]) for i in range(len(LAYERS))]
    return resampler, pairs


def dialect(adapter, prefix, key, value):
    """Flat names: resampler under a prefix, projections by name patterns with the layer's number or path."""
    resampler, pairs = parts(adapter)
    state = {prefix + name: tensor for name, tensor in resampler.items()}
    for i, (to_k, to_v) in enumerate(pairs):
        names = {"n": i, "odd": 2 * i + 1, "path": NAMES[i]}
        state |= {key.format(**names): to_k, value.format(**names): to_v}
    return dict(sorted(state.items()))  # as safetensors files list them: 11 before 3


DIALECTS = {
    "ip-adapter": ("image_proj.", "ip_adapter.{odd}.to_k_ip.weight", "ip_adapter.{odd}.to_v_ip.weight"),
    "trainer": ("image_proj_model.", "adapter_modules.{odd}.to_k_ip.weight", "adapter_modules.{odd}.to_v_ip.weight"),
    "qformer": ("qformer.", "nested.{n}.to_k_nested.weight", "nested.{n}.to_v_nested.weight"),
    "plain to_k": ("resampler.", "layers.{n}.to_k.weight", "layers.{n}.to_v.weight"),
    "prefix last": ("encoder.resampler.", "attn.{n}.nested_to_k.weight", "attn.{n}.nested_to_v.weight"),
    "kinds apart": ("qformer.", "to_k_nest.{n}.weight", "to_v_nest.{n}.weight"),
    "module": ("module.image_proj.", "module.ip_adapter.{n}.to_k_ip.weight", "module.ip_adapter.{n}.to_v_ip.weight"),
    "diffusers": (
        "image_proj.",
        "{path}.attn2.processor.to_k_nested.weight",
        "{path}.attn2.processor.to_v_nested.weight",
    ),
    "underscores": ("qformer.", "nested_{odd}.to_k.weight", "nested_{odd}.to_v.weight"),
    "no prefix": ("", "ip_adapter.{odd}.to_k_ip.weight", "ip_adapter.{odd}.to_v_ip.weight"),
}


def same(adapter, other):
    state, expected = other.state_dict(), adapter.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "nested bin"])
def test_dialects(adapter, tmp_path, name, kind):
    state = dialect(adapter, *DIALECTS[name])
    if kind == "safetensors":
        path = tmp_path / "adapter.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        path = tmp_path / "adapter.bin"
        torch.save(nest(state) if kind == "nested bin" else OrderedDict(state), path)
    loaded = read_adapter(path)
    same(adapter, loaded)
    assert loaded.config == CONFIG


def nest(state):
    nested = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = tensor
        else:
            nested[name] = tensor
    return nested


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_saved_training_module_brings_its_unet(adapter, wrapper):
    state = dialect(adapter, *DIALECTS["trainer"]) | {"unet.conv_in.weight": torch.zeros(1)}
    same(adapter, build_adapter({wrapper + name: tensor for name, tensor in state.items()}, {}))


def test_own_format_keeps_the_configuration(tmp_path):
    config = AdapterConfig(
        **{**CONFIG.__dict__, "class_word": "dog", "norm": "clamp", "norm_factor": 1.5, "embeddings": {"l": 8}}
    )
    adapter = NestedAdapter(config)
    write_adapter(adapter, tmp_path / "dog.safetensors", notes={"license": "CC0-1.0"})
    loaded = read_adapter(tmp_path / "dog.safetensors")
    same(adapter, loaded)
    assert loaded.config == config
    assert read_tensors(tmp_path / "dog.safetensors")[1]["license"] == "CC0-1.0"


def test_precision_of_the_file_is_kept(adapter, tmp_path):
    half = NestedAdapter(CONFIG).half()
    write_adapter(half, tmp_path / "half.safetensors")
    assert {p.dtype for p in read_adapter(tmp_path / "half.safetensors").parameters()} == {torch.float16}


def test_writing_is_all_or_nothing(adapter, tmp_path, monkeypatch):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"what was there")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_adapter(adapter, path)
    assert path.read_bytes() == b"what was there" and os.listdir(tmp_path) == [path.name]


def test_pickles_run_no_code(tmp_path):
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps({"latents": os.system}))
    with pytest.raises(pickle.UnpicklingError):
        read_adapter(path)


def broken(adapter, change):
    state = dialect(adapter, *DIALECTS["ip-adapter"])
    change(state)
    return state


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("image_proj.latents"), "no Nested Attention adapter: it holds no Q-Former"),
        (
            lambda s: s.update({"b.latents": torch.zeros(1, 6, 64)}),
            "several Q-Formers.*`b.latents`, `image_proj.latents`",
        ),
        (lambda s: s.pop("ip_adapter.3.to_v_ip.weight"), r"Layer `ip_adapter.3` .* no pair .* but k \(8, 12\)"),
        (lambda s: s.update({"ip_adapter.3.to_v_ip.weight": torch.zeros(9, 12)}), r"k \(8, 12\), v \(9, 12\)"),
        (
            lambda s: s.update({"lora.up.weight": torch.zeros(2, 2)}),
            "1 tensors that are part of no known structure: `lora",
        ),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("ip_")], "but no nested projections"),
        (lambda s: s.update({"image_proj.pos_emb.weight": torch.zeros(3, 3)}), "unknown kind: it also holds `pos_emb"),
        (lambda s: s.pop("image_proj.proj_in.weight"), "lacks 'proj_in.weight'"),
        (lambda s: s.pop("image_proj.layers.1.0.to_q.weight"), "resampler.layers.1.0.to_q.weight: missing"),
        (
            lambda s: s.update(
                {"ip_adapter.1.to_k_ip.weight": torch.zeros(8, 13), "ip_adapter.1.to_v_ip.weight": torch.zeros(8, 13)}
            ),
            "width 13",
        ),
        (lambda s: s.update({"epoch": 3}), "`epoch` holds a int"),
    ],
)
def test_refusals(adapter, change, message):
    with pytest.raises(AdapterFileError, match=message):
        build_adapter(broken(adapter, change), {})


def test_a_checkpoint_is_refused():
    state = {f"model.diffusion_model.block.{i}.weight": torch.zeros(1) for i in range(20)}
    with pytest.raises(AdapterFileError, match="Found 20 tensors: .* and 12 more"):
        canonical(state)


def test_a_list_is_refused():
    with pytest.raises(AdapterFileError, match="holds a list"):
        canonical([torch.zeros(1)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 10**9}, "does not fit its own configuration.*1000000000"),
        ({"queries": "6"}, "queries is '6'"),
        ({"heads": -1}, "heads is -1"),
        ({"layers": [8, 1.5]}, r"layers\[1\] is 1.5"),
        ({"embeddings": {"l": 0}}, "embeddings of l is 0"),
        ({"embeddings": None}, "incomplete"),
        ({"norm_factor": "abc"}, "norm_factor is 'abc'"),
        ({"norm_factor": float("nan")}, "norm_factor is nan"),
        ({"class_word": None}, "class_word is None"),
    ],
)
def test_configurations_of_no_adapter(adapter, change, said):
    """Before anything of such a size is made."""
    values = {**json.loads(CONFIG.to_json()), **change}
    with pytest.raises(ValueError, match=said):
        build_adapter(adapter.state_dict(), {"nested_attention": json.dumps(values)})


@pytest.mark.parametrize("text", ["null", "5", "{", "[" * 10**5])
def test_a_configuration_that_is_no_object(adapter, text):
    with pytest.raises(ValueError, match="configuration is incomplete"):
        build_adapter(adapter.state_dict(), {"nested_attention": text})


def test_odd_contents(adapter):
    resampler, _ = parts(adapter)
    endless = {"latents": resampler["latents"]}
    endless["again"] = endless
    for content, said in (
        (endless, "holds a dict"),
        ({"latents": resampler["latents"].to("meta")}, "holds a Tensor"),
        ({**adapter.state_dict(), "module.resampler.latents": resampler["latents"]}, "weights twice"),
        ({"layers.9999999.0.to_q.weight": torch.ones(64, 64), **dialect(adapter, "", "k", "v")}, "does not fit"),
        ({"proj_in.weight": torch.ones(3, 3), **dialect(adapter, "image_proj.", "k", "v")}, "`proj_in.weight`"),
    ):
        with pytest.raises(AdapterFileError, match=said):
            build_adapter(content, {})


def test_configuration_of_a_newer_version():
    text = json.dumps({**json.loads(CONFIG.to_json()), "shiny": 1})
    with pytest.raises(ValueError, match="shiny.*newer version"):
        AdapterConfig.from_json(text)
    with pytest.raises(ValueError, match="incomplete"):
        AdapterConfig.from_json("{}")
    with pytest.raises(ValueError, match="norm is 'loud'"):
        AdapterConfig(**{**CONFIG.__dict__, "norm": "loud"})


def test_fingerprint_tells_weights_apart(adapter):
    state = adapter.state_dict()
    changed = {**state, "layers.0.to_k.weight": state["layers.0.to_k.weight"] + 1e-3}
    assert fingerprint(state) == fingerprint(dict(reversed(state.items()))) != fingerprint(changed)


def test_fingerprint_is_that_of_every_processor():
    """Saved subjects go from one machine to another."""
    code = "import torch, nested_attention.adapter as a; print(a.fingerprint({'x': torch.arange(5120 * 1280)}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
        ).stdout
        for capability in ("default", "avx2")
    }
    assert len(found) == 1


def test_fingerprint_of_large_tensors():
    """Of CLIP-L's token embedding, say; counted in fp32, its last place is one beyond the end."""
    assert len(fingerprint({"x": torch.zeros(1).expand(49408, 768)})) == 16


def test_a_file_that_is_held_for_a_moment_is_written_when_it_is_free(tmp_path, monkeypatch):
    """As a virus scanner does on Windows."""
    path, tries = tmp_path / "loss.png", iter([PermissionError, PermissionError, None])

    def replace(new, old):
        if error := next(tries):
            raise error(13, "in use")
        Path(new).rename(old)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(PermissionError):  # elsewhere it is for good
        files.write_atomically(path, lambda file: file.write(b"1"))
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0))
    files.write_atomically(path, lambda file: file.write(b"2"))
    assert path.read_bytes() == b"2" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_cleared_away(adapter, tmp_path):
    """And all may read the file who may read others; safetensors gives it to its owner alone."""
    path, plain = tmp_path / "a.safetensors", tmp_path / "plain"
    (left := tmp_path / "a.safetensors.unfinished").mkdir()
    (left / ".tmpKQleoB").write_bytes(b"half of it")
    write_adapter(adapter, path)
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode and {*tmp_path.iterdir()} == {path, plain}


def test_what_is_synchronized_is_what_was_written(adapter, tmp_path, monkeypatch):
    """Before it takes the old file's place, or a loss of power could leave neither."""
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda number: synced.append(os.fstat(number)))
    write_adapter(adapter, tmp_path / "a.safetensors")
    files.write_atomically(tmp_path / "b", lambda file: file.write(b"1"))
    assert [(s.st_ino, s.st_size) for s in synced] == [
        (s.st_ino, s.st_size) for s in (os.stat(tmp_path / name) for name in ("a.safetensors", "b"))
    ]
