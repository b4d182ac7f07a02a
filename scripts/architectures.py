"""Names and shapes of the weights of real models, as their published files have them.

The models are built from ComfyUI's own classes without memory for the weights, so the shapes are true by
construction. ComfyUI's folder must be on sys.path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from comfy.cli_args import args

args.cpu = True  # shapes need no device; without this the import below looks for a GPU

import comfy.clip_model  # noqa: E402
import comfy.clip_vision  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

from .unets import UNET_COMMON, UNET_SD15, UNET_SDXL  # noqa: E402

Shapes = dict[str, tuple[int, ...]]
StateDict = dict[str, torch.Tensor]

AUTOENCODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def sd15() -> Shapes:
    """A Stable Diffusion 1.5 checkpoint: UNet, CLIP-L, autoencoder."""
    text = comfy.sd1_clip.SD1ClipModel(device="meta", dtype=torch.float16)
    return _checkpoint(comfy.supported_models.SD15, UNET_SD15, text)


def sdxl() -> Shapes:
    """A Stable Diffusion XL base checkpoint: UNet, CLIP-L and OpenCLIP-G, autoencoder."""
    text = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16)
    return _checkpoint(comfy.supported_models.SDXL, UNET_SDXL, text)


def vit_h() -> Shapes:
    """The CLIP ViT-H/14 image encoder that the IP-Adapter lineage uses."""
    config = json.loads((Path(comfy.clip_vision.__file__).parent / "clip_vision_config_h.json").read_text())
    model = comfy.clip_model.CLIPVisionModelProjection(config, torch.float16, "meta", comfy.ops.disable_weight_init)
    return _shapes(model.state_dict())


def _checkpoint(family: type, unet_options: dict[str, Any], text: torch.nn.Module) -> Shapes:
    naming = family({**UNET_COMMON, **unet_options})
    with torch.device("meta"):
        unet = UNetModel(**UNET_COMMON, **unet_options, dtype=torch.float16, device="meta")
        autoencoder = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4)
    parts = [
        naming.process_unet_state_dict_for_saving(unet.state_dict()),
        naming.process_clip_state_dict_for_saving(text.state_dict()),
        naming.process_vae_state_dict_for_saving(autoencoder.state_dict()),
    ]
    return {name: shape for part in parts for name, shape in _shapes(part).items()}


def _shapes(state: StateDict) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
