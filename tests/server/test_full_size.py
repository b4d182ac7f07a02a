"""SDXL, foreign adapter files and the image encoder at their true sizes: minutes, and up to 18 GB of memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from served import change

from scripts.environment import ensure_host
from scripts.generate_weights import ensure_weights

pytestmark = pytest.mark.slow

BASES = ("sd15", "sdxl")
PIXELS = {"sd15": 128, "sdxl": 256}
# of the pictures that CLIP was trained with
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def full_size(studio):
    ensure_weights(ensure_host(), "sdxl")
    return studio


def test_two_subjects_in_sdxl(full_size):
    prompt = full_size.prompt("two_subjects_sdxl", "sdxl", PIXELS["sdxl"])
    both = full_size.draw(prompt)
    change(prompt, "NestedAttentionApplySubject", 1, strength=0.0)
    assert not np.array_equal(full_size.draw(prompt), both)


@pytest.mark.parametrize("base", BASES)
def test_foreign_adapter_files_draw_the_same_picture(full_size, folder, base):
    prompt = full_size.prompt(f"one_subject_{base}", base, PIXELS[base])
    own = full_size.draw(prompt)
    weights = load_file(ensure_host().models / "nested_attention" / f"generated-person-{base}.safetensors")
    for write in (write_ip_adapter, write_trainer):
        path = write(folder / "nested_attention", weights)
        try:
            change(prompt, "NestedAttentionLoadAdapter", adapter_name=path.name)
            assert np.array_equal(full_size.draw(prompt), own), path.name
        finally:
            path.unlink()


def write_ip_adapter(place: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Two dictionaries in a pickled file; projections numbered among all attention layers, odd for cross-attention."""
    resampler = {k.removeprefix("resampler."): v for k, v in weights.items() if k.startswith("resampler.")}
    path = place / "ip-adapter.bin"
    torch.save({"image_proj": resampler, "ip_adapter": projections(weights, lambda i: f"{2 * i + 1}.")}, path)
    return path


def write_trainer(place: Path, weights: dict[str, torch.Tensor]) -> Path:
    """One flat file of a whole training module."""
    named = {k.replace("resampler.", "image_proj_model.", 1): v for k, v in weights.items()}
    flat = {k: v for k, v in named.items() if k.startswith("image_proj_model.")}
    path = place / "trainer.safetensors"
    save_file(flat | projections(weights, lambda i: f"adapter_modules.{i}."), path)
    return path


def projections(weights: dict[str, torch.Tensor], name_of) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in weights.items():
        if name.startswith("layers."):
            _, number, kind, _ = name.split(".")
            found[f"{name_of(int(number))}{kind}_ip.weight"] = tensor
    return found


def test_the_image_encoder_gives_the_features_of_transformers():
    import comfy.clip_vision
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    (path,) = ensure_weights(ensure_host(), "vit-h")
    config = json.loads((Path(comfy.clip_vision.__file__).parent / "clip_vision_config_h.json").read_text())
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}
    with torch.device("meta"):
        theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval()
    theirs.load_state_dict(state, assign=True, strict=False)
    theirs.vision_model.embeddings.position_ids = torch.arange(257)[None]
    assert not [name for name, tensor in theirs.named_parameters() if tensor.is_meta]

    encoder = comfy.clip_vision.load(str(path))
    pictures = torch.randint(256, (2, 224, 224, 3), generator=torch.Generator().manual_seed(0)) / 255
    ours = encoder.encode_image(pictures)
    with torch.no_grad():
        out = theirs(((pictures - MEAN) / DEVIATION).movedim(-1, 1), output_hidden_states=True)
    assert_close(ours.last_hidden_state, out.hidden_states[-1])
    assert_close(ours.penultimate_hidden_states, out.hidden_states[-2])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape == (2, 257, 1280)
    assert (ours - theirs).norm() / theirs.norm() < 1e-3
