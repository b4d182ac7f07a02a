"""The small model that comes with the pack, built of the host's own classes: MODEL, CLIP, VAE, CLIP_VISION.

It draws cartoon people and pets at 64 x 64 pixels. `studio/` in the repository trains it and writes its weights.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.pixel_space_convert
import comfy.sd
import comfy.supported_models_base
import torch
import torch.nn.functional as F
from comfy import sd1_clip
from torch import Tensor

from .adapters import read_weights
from .base import Base

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
FILE = "studio.safetensors"
PATCH = 2  # pixels are put into channels by squares of this side: a VAE without weights, so that nothing is lost
LATENTS, CONTEXT = 3 * PATCH**2, 192
UNET = {
    "image_size": 32, "in_channels": LATENTS, "out_channels": LATENTS, "model_channels": 32, "channel_mult": [1, 2, 3],
    "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1, "context_dim": CONTEXT, "use_linear_in_transformer": True, "num_head_channels": 32,
    "use_spatial_transformer": True, "use_temporal_attention": False, "legacy": False,
}  # fmt: skip
TEXT = {
    "hidden_size": CONTEXT, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 4 * CONTEXT,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 160, "num_hidden_layers": 5, "num_attention_heads": 5,
    "intermediate_size": 640, "image_size": 96, "patch_size": 12, "num_channels": 3, "projection_dim": 128,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
EMBEDDING = "text_model.embeddings.token_embedding.weight"


class StudioLatents(comfy.latent_formats.LatentFormat):
    scale_factor = 1.9  # to unit variance
    latent_channels = LATENTS
    spacial_downscale_ratio = PATCH
    latent_rgb_factors = [[float(color == i // PATCH**2) / PATCH**2 for color in range(3)] for i in range(LATENTS)]


class PixelLatents(comfy.pixel_space_convert.PixelspaceConversionVAE):
    """Pixels -1..1 [B, 3, H, W] to [B, 12, H / 2, W / 2] and back."""

    def encode(self, pixels: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.pixel_unshuffle(pixels, PATCH)

    def decode(self, samples: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.pixel_shuffle(samples, PATCH)


class StudioModel(comfy.supported_models_base.BASE):
    """Rectified flow."""

    latent_format = StudioLatents
    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"shift": 1.0}
    memory_usage_factor = 0.1

    def model_type(self, state_dict: Any, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW

    def inpaint_model(self) -> bool:
        return False  # more than four channels are no sign of it here


class StudioText(sd1_clip.SDClipModel):
    """CLIP's text model, small; what comes after the end of a text is zero, so that no padding is attended."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None, **_: Any):
        super().__init__(
            device=device, dtype=dtype, textmodel_json_config=dict(TEXT), zero_out_masked=True,
            return_projected_pooled=False, model_options={**(model_options or {}), "model_name": "studio"},
        )  # fmt: skip


def load_studio(folder: Path = WEIGHTS) -> Base:
    """The whole small model. Raises AdapterFileError where its file cannot be read."""
    parts = read_parts(folder)
    return Base(
        diffusion_model(folder),
        text_encoder(parts["text"], parts["words"]["ids"], parts["words"]["unknown"]),
        pixel_latents(),
        image_encoder(parts["vision"]),
    )


def read_parts(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part by name, in fp32."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in read_weights(str(folder / FILE))[0].items():
        part, name = key.split(".", 1)
        parts.setdefault(part, {})[name] = value.float() if value.is_floating_point() else value
    return parts


def diffusion_model(folder: Path, disable_dynamic: bool = False) -> Any:
    """The UNet as a model of the host, which can make further ones by itself."""
    state = read_parts(folder)["unet"]
    config = StudioModel(UNET)
    config.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model({}, device=offload)
    make = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = make(model, load_device=device, offload_device=offload)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (diffusion_model, (folder,))
    return patcher


def text_encoder(state: dict[str, Tensor], words: Tensor, unknown: Tensor) -> Any:
    """`words` [W] are the tokens that it learned, in the order of its embedding's rows; all others are `unknown`."""
    tokenizer = partial(sd1_clip.SDTokenizer, embedding_size=CONTEXT)
    target = comfy.supported_models_base.ClipTarget(
        partial(sd1_clip.SD1Tokenizer, tokenizer=tokenizer), partial(sd1_clip.SD1ClipModel, clip_model=StudioText)
    )
    clip = comfy.sd.CLIP(target, embedding_directory=None, model_options={"dtype": torch.float32})
    table = unknown.repeat(len(clip.tokenizer.clip_l.inv_vocab), 1)
    table[words] = state[EMBEDDING]
    clip.cond_stage_model.clip_l.transformer.load_state_dict({**state, EMBEDDING: table})
    return clip


def pixel_latents() -> Any:
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = PixelLatents()
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = LATENTS, PATCH, PATCH
    return vae


def image_encoder(state: dict[str, Tensor]) -> Any:
    vision = comfy.clip_vision.ClipVisionModel(dict(VISION))
    vision.load_sd(state)
    return vision
