"""The base model of a training from its files: which part is read from where, and which one is missing."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import comfy.clip_vision
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file
from small_training import settings

from nested_attention.host.base import Base, load_base
from nested_attention.training.config import TrainingError


class Vae(str):
    def throw_exception_if_invalid(self):
        pass


@pytest.fixture
def loaders(monkeypatch):
    """The host's, which tell what they were given; a checkpoint holds the parts of the list returned."""
    parts = ["unet", "clip", "vae", "vision"]

    def put(module, name, instead):
        """With the arguments of the host's own alone, which a name that it does not know would not pass."""
        known = inspect.signature(getattr(module, name))

        def call(*given, **named):
            known.bind(*given, **named)
            return instead(*given, **named)

        monkeypatch.setattr(module, name, call)

    def load_checkpoint(path, output_clipvision, model_options, **_):
        assert model_options == {"dtype": torch.float32}
        held = [f"{part} of {path}" if part else None for part in parts]
        return *held[:3], held[3] if output_clipvision else None

    def load_diffusion_model(path, model_options, **_):
        assert model_options == {"dtype": torch.float32}
        return path

    put(comfy.sd, "load_checkpoint_guess_config", load_checkpoint)
    put(comfy.sd, "load_diffusion_model", load_diffusion_model)
    put(comfy.sd, "load_clip", lambda paths, **_: paths)
    put(comfy.utils, "load_torch_file", lambda path, **_: (path, {}))
    put(comfy.sd, "VAE", lambda sd, metadata: Vae(sd))
    put(comfy.clip_vision, "load", lambda path: path)
    return parts


FILES = {"diffusion_model": "u", "text_encoders": ("l", "g"), "vae": "v", "clip_vision": "i"}


def test_files_of_parts_come_before_those_of_a_checkpoint(tmp_path, loaders):
    whole, parts = settings(tmp_path, checkpoint="a"), settings(tmp_path, **FILES)
    assert load_base(whole) == Base("unet of a", "clip of a", "vae of a", "vision of a")
    assert load_base(parts) == load_base(replace(parts, checkpoint="a")) == Base("u", ["l", "g"], "v", "i")
    assert load_base(replace(whole, vae="v")) == Base("unet of a", "clip of a", "v", "vision of a")


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_part_of_the_base_model_is_named(tmp_path, loaders, missing):
    """Whether no file is named for it, or the checkpoint does not hold it."""
    at = list(FILES).index(missing)
    named = "checkpoint or diffusion_model" if at == 0 else missing
    loaders[at] = ""
    for files in ({k: v for k, v in FILES.items() if k != missing}, {"checkpoint": "a"}):
        with pytest.raises(TrainingError, match=f"not complete. Name files for: {named}.$"):
            load_base(settings(tmp_path, **files))


SETTINGS = ("checkpoint", "diffusion_model", "vae", "clip_vision", "text_encoders")


@pytest.mark.parametrize(
    ("setting", "whole"),
    [*((s, False) for s in SETTINGS), *((s, True) for s in SETTINGS[:-1])],  # any whole file is a text encoder
)
def test_a_file_of_something_else_is_named(tmp_path, setting, whole):
    path = tmp_path / "file.safetensors"
    save_file({"weight": torch.ones(64)}, path)
    if not whole:
        path.write_bytes(path.read_bytes()[:20])
    named = (str(path),) if setting == "text_encoders" else str(path)
    with pytest.raises(TrainingError, match=rf"^{setting} = {re.escape(str(path))} cannot be read: "):
        load_base(settings(tmp_path, **{setting: named}))
