"""Latents and text states that are kept: the same training with and without, and never another model's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import make_clip, randomize
from small_training import Row, SmallVAE, exact, losses, make_base, make_data, settings

from nested_attention.host.base import encoders_fingerprint
from nested_attention.host.objective import DiffusionObjective
from nested_attention.host.train import make_adapter, train
from nested_attention.training.cache import Cache, cache_key
from nested_attention.training.config import TrainingConfig, TrainingError, from_arguments
from nested_attention.training.samples import Sample
from nested_attention.training.troubles import Troubles


@pytest.fixture
def folder(tmp_path):
    return make_data(tmp_path)


@pytest.fixture(scope="module")
def base():
    return make_base()


class DrawingVAE(SmallVAE):
    """Draws its latents from a distribution, as real ones do, and counts its calls."""

    calls = 0

    def encode(self, pixels):
        self.calls += 1
        latent = super().encode(pixels)
        return latent + 0.1 * torch.randn(latent.shape)


@exact
def test_all_kinds_of_cache_train_alike(base, folder):
    vae = DrawingVAE()
    kept, found = {}, {}
    for kind in ("memory", "disk"):
        config = settings(folder, output=str(folder / kind), cache=kind, caption_dropout=0.3)
        vae.calls = 0
        assert train(config, replace(base, vae=vae))
        kept[kind], found[kind] = vae.calls, losses(config)
    assert kept == {"memory": 3, "disk": 3} and found["memory"] == found["disk"]
    files = sorted((folder / "disk" / "cache").rglob("*.safetensors"))
    assert len(files) in (5, 6)  # three pictures; two or three captions
    config = settings(folder, output=str(folder / "again"), cache="disk", caption_dropout=0.3)
    (folder / "disk" / "cache").rename(folder / "kept")
    (folder / "again").mkdir()
    (folder / "kept").rename(folder / "again" / "cache")
    files = sorted((folder / "again" / "cache").rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-10])
    files[1].write_bytes(b"")
    assert train(config, replace(base, vae=vae))
    assert losses(config) == found["memory"]
    assert sorted((folder / "again" / "cache").rglob("*.*")) == files and all(f.stat().st_size > 100 for f in files)


@exact
def test_without_a_cache_the_text_is_the_same(base, folder):
    plain = settings(folder)
    kept = settings(folder, output=str(folder / "kept"), cache="disk")
    assert train(plain, base) and train(kept, base)
    assert losses(plain) == losses(kept)


def test_another_model_has_other_keys(base):
    assert encoders_fingerprint(base) == encoders_fingerprint(replace(base, clip=base.clip.clone()))
    skipping = base.clip.clone()
    skipping.clip_layer(-2)
    other = make_clip()
    randomize(other.cond_stage_model, 7)
    patched = base.clip.clone()
    name, weight = next((n, p) for n, p in patched.cond_stage_model.named_parameters() if p.ndim == 2)
    patched.add_patches({name: ("diff", (torch.ones_like(weight),))})
    vaes = [type("OtherVAE", (SmallVAE,), {})(), *(SmallVAE() for _ in range(3))]
    for vae, weight, dtype in zip(vaes[1:], (0.0, 1.0, 1.0), (None, None, torch.bfloat16), strict=True):
        vae.first_stage_model, vae.vae_dtype = torch.nn.Linear(2, 2, bias=False), dtype
        torch.nn.init.constant_(vae.first_stage_model.weight, weight)
    others = [replace(base, clip=clip) for clip in (skipping, other, patched)] + [replace(base, vae=v) for v in vaes]
    assert len({encoders_fingerprint(each) for each in [base, *others]}) == 8
    assert encoders_fingerprint(base) == encoders_fingerprint(base)
    a, b = torch.rand(1, 4, 6, 3), torch.rand(1, 4, 6, 3)
    keys = {cache_key("latent", x) for x in (a, b, a.reshape(1, 6, 4, 3))} | {cache_key("text", a)}
    assert len(keys) == 4 and cache_key("latent", a) == cache_key("latent", a.clone())


def test_files_are_taken_only_for_what_they_were_made_of(base, folder):
    """Beside those of another model, picture, caption or class word, all is as it would be without any."""
    plain = Sample(Row(0, (32, 32), 0), torch.rand(1, 32, 32, 3), None, "a <person> and a <dog>", (32, 32))
    clip = make_clip()
    randomize(clip.cond_stage_model, 7)
    vae = type("OtherVAE", (SmallVAE,), {"encode": lambda self, pixels: SmallVAE.encode(self, 1 - pixels)})()
    sizes = []
    for model, sample, word in (
        (base, plain, "person"),
        (base, replace(plain, picture=torch.rand(1, 32, 32, 3)), "person"),
        (base, replace(plain, caption="the <person> and a <dog>"), "person"),
        (base, plain, "dog"),
        (replace(base, clip=clip), plain, "person"),
        (replace(base, vae=vae), plain, "person"),
    ):
        found = []
        for cache in ("off", "disk", "disk"):
            config = settings(folder, cache=cache, class_word=word)
            objective = DiffusionObjective(model, make_adapter(config, model), config)
            latent = objective.latent(sample)
            conds, places = objective.text(sample, latent)
            found.append((latent, conds["model_conds"]["c_crossattn"].cond, conds["model_conds"]["y"].cond, places))
        torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)
        sizes.append(len(list((folder / "out" / "cache").rglob("*.safetensors"))))
    assert sizes == [2, 3, 4, 5, 7, 9]  # another encoder's are other files, of text and latents both


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_all_that_an_encoder_may_give(tmp_path, caplog, dtype):
    made = {"x": torch.ones(2, 3).to(dtype), "one": torch.ones(()).to(dtype), "none": torch.ones(0, 4).to(dtype)}
    for _ in range(2):
        found = Cache("disk", tmp_path, Troubles("stop")).get("ab", lambda: made)
        assert found.keys() == made.keys() and all(torch.equal(found[k].float(), made[k].float()) for k in made)
    assert not caplog.records


def test_numbers_that_changed_on_the_disk_are_made_again(tmp_path, caplog):
    """The file is whole, and reads as well as before."""
    made = {"x": torch.ones(4), "y": torch.zeros(2)}
    Cache("disk", tmp_path, Troubles("stop")).get("ab", lambda: made)
    path = tmp_path / "ab" / "ab.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    for _ in range(2):
        found = Cache("disk", tmp_path, Troubles("stop")).get("ab", lambda: made)
        torch.testing.assert_close(found, made, rtol=0, atol=0)
    assert caplog.text.count("is damaged and is made again: it holds other numbers") == 1


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("nested_attention.files.os.fsync", full)
    made = {"x": torch.ones(1)}
    cache = Cache("disk", tmp_path, Troubles("skip"))
    assert cache.get("ab", lambda: made) is made and cache.troubles.count == 1
    with pytest.raises(TrainingError, match="ab.safetensors could not be written: No space left"):
        Cache("disk", tmp_path, Troubles("stop")).get("ab", lambda: made)


def test_settings_as_they_were_before_there_was_a_disk(tmp_path):
    assert [TrainingConfig(data="d", output="o", cache=c).cache for c in (True, False, "disk")] == [
        "memory",
        "off",
        "disk",
    ]
    for options, kind in (((), "off"), (["--cache"], "memory"), (["--no-cache"], "off"), (["--cache", "disk"], "disk")):
        assert from_arguments(["--data", "d", "--output", "o", *options]).cache == kind
    (tmp_path / "a.json").write_text('{"data": "d", "output": "o", "cache": true}')
    assert from_arguments(["--config", str(tmp_path / "a.json")]).cache == "memory"
    with pytest.raises(TrainingError, match="cache is 'ram', expected one of off, memory, disk"):
        TrainingConfig(data="d", output="o", cache="ram")
