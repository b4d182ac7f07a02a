"""ComfyUI's real classes, small: a UNet of the SDXL family, its two CLIPs, an adapter for them."""

from __future__ import annotations

from pathlib import Path

import comfy.cldm.cldm as cldm
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.controlnet import ControlNet

from nested_attention.adapter import AdapterConfig, NestedAdapter
from nested_attention.files import write_adapter
from nested_attention.host.adapters import BoundSubject
from nested_attention.subject import Subject

CLIP_L, CLIP_G = 32, 64
CONTEXT = CLIP_L + CLIP_G
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 2],
    "transformer_depth_output": [1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "context_dim": CONTEXT,
    "use_linear_in_transformer": True,
    "adm_in_channels": CLIP_G + 6 * 256,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}


def randomize(module: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    """Weights that leave activations of order one and no output at zero."""
    make = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            fan_in = p[0].numel()
            p.data = torch.randn(p.shape, generator=make) * scale * fan_in**-0.5
        else:
            p.data = torch.ones(p.shape) if name.endswith("weight") else torch.randn(p.shape, generator=make) * 0.02


def make_model(dtype: torch.dtype = torch.float32, computed: torch.dtype = torch.float32):
    """A patcher of a small SDXL whose weights are stored in one precision and used in another."""
    config = comfy.supported_models.SDXL({**UNET, "dtype": dtype})
    config.unet_config["num_head_channels"] = 16  # the host presets 64 for SDXL
    config.set_inference_dtype(dtype, None if dtype == computed else computed)
    model = comfy.model_base.SDXL(config, device=torch.device("cpu"))
    randomize(model.diffusion_model, 0)
    model.diffusion_model.to(dtype)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def make_clip():
    small = {"num_hidden_layers": 3, "num_attention_heads": 4}
    options = {
        "clip_l_model_config": {**small, "hidden_size": CLIP_L, "intermediate_size": 64},
        "clip_g_model_config": {**small, "hidden_size": CLIP_G, "intermediate_size": 128, "projection_dim": CLIP_G},
    }
    target = comfy.supported_models.SDXL(UNET).clip_target()
    clip = comfy.sd.CLIP(target, embedding_directory=None, model_options=options)
    randomize(clip.cond_stage_model, 1, scale=2.0)
    return clip


def make_adapter(path: Path, sites, seed: int = 2, **changes) -> Path:
    settings = {"image_dim": 48, "dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "queries": 12}
    settings |= {"output_dim": CONTEXT, "layers": tuple(site.inner for site in sites)}
    adapter = NestedAdapter(AdapterConfig(**{**settings, **changes}))
    randomize(adapter, seed)
    write_adapter(adapter, path)
    return path


def make_subject(adapter, seed: int = 3) -> BoundSubject:
    make = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 17, adapter.config.image_dim, generator=make)
    tokens = adapter.patcher.model.resampler(features)
    return BoundSubject(Subject(tokens, adapter.fingerprint, adapter.name), adapter)


def make_controlnet():
    """A ControlNet with a UNet encoder of the small model's widths."""
    config = {k: v for k, v in UNET.items() if k not in ("out_channels", "transformer_depth_output", "legacy")}
    net = cldm.ControlNet(
        **config, num_head_channels=16, hint_channels=3, operations=comfy.ops.manual_cast, dtype=torch.float32
    )
    randomize(net, 5, scale=0.3)
    return ControlNet(net, global_average_pooling=False, load_device=comfy.model_management.get_torch_device())


def make_clip_vision(width: int = 48):
    """An image encoder of 32 px in patches of 8."""
    config = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 3}
    config |= {"image_size": 32, "patch_size": 8, "num_channels": 3, "projection_dim": 24}
    config |= {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "model_type": "clip_vision_model"}
    vision = ClipVisionModel(config)
    randomize(vision.model, 6, scale=2.0)
    return vision
