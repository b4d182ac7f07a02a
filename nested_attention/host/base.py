"""The base model of a training: read from files by the host's loaders, frozen, and the adapter that starts from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapter import AdapterConfig, NestedAdapter, fingerprint
from ..training.config import TrainingConfig, TrainingError
from .adapters import reason_of
from .layers import Site, cross_attention_sites

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Base:
    """All that stays as it is: the host's model, text encoders, VAE and image encoder."""

    model: Any
    clip: Any
    vae: Any
    clip_vision: Any

    def modules(self) -> list[nn.Module]:
        """Those whose weights could take a gradient."""
        vae = getattr(self.vae, "first_stage_model", None)
        found = (self.model.model, self.clip.cond_stage_model, self.clip_vision.model, vae)
        return [module for module in found if isinstance(module, nn.Module)]

    def unpin(self) -> None:
        """Let go of page-locked weights, which are registered by their addresses. The host locks them again."""
        parts = (self.clip, self.vae, self.clip_vision)
        for patcher in (self.model, *(getattr(part, "patcher", None) for part in parts)):
            if patcher is not None and not patcher.is_dynamic():
                patcher.unpin_all_weights()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No weight of these takes a gradient; afterwards all is as it was."""
        self.unpin()
        for module in self.modules():
            leave_inference_mode(module)
        before = [(p, p.requires_grad) for module in self.modules() for p in module.parameters()]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)


def leave_inference_mode(root: nn.Module) -> None:
    """Weights that a node loaded, in inference mode, cannot be kept for gradients: equal ones take their place."""
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)


def encoders_fingerprint(base: Base) -> str:
    """Tells apart the models, and what was done to them, that make latents and text states."""
    comfy.model_management.load_models_gpu([base.clip.patcher])  # so that what patches it is in the weights
    clip, vae = base.clip, getattr(base.vae, "first_stage_model", None)
    parts = [fingerprint(m.state_dict()) for m in (clip.cond_stage_model, vae) if isinstance(m, nn.Module)]
    patches = clip.patcher.patches_uuid if clip.patcher.patches else None  # some may not be
    return repr((parts, type(base.vae).__name__, getattr(base.vae, "vae_dtype", None), clip.layer_idx, patches))


@contextmanager
def reading(setting: str, path: str) -> Iterator[None]:
    """Raises TrainingError, which names the setting and its file, where that cannot be read."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each format has errors of its own, and none names the file
        raise TrainingError(
            f"{setting} = {path} cannot be read: {reason_of(error)}. It is not there, damaged, not completely "
            "downloaded, or something else than this setting is for."
        ) from error


def load_base(config: TrainingConfig) -> Base:
    """The base model from its files. Raises TrainingError where one cannot be read, or a part of it is missing."""
    options = {"dtype": DTYPES[config.precision]}
    model = clip = vae = vision = None
    if config.checkpoint:
        with reading("checkpoint", config.checkpoint):
            model, clip, vae, vision = comfy.sd.load_checkpoint_guess_config(
                config.checkpoint, output_clipvision=not config.clip_vision, model_options=options, disable_dynamic=True
            )
    if config.diffusion_model:
        with reading("diffusion_model", config.diffusion_model):
            model = comfy.sd.load_diffusion_model(config.diffusion_model, model_options=options, disable_dynamic=True)
    if config.text_encoders:
        with reading("text_encoders", ", ".join(config.text_encoders)):
            clip = comfy.sd.load_clip(list(config.text_encoders), disable_dynamic=True)
    if config.vae:
        with reading("vae", config.vae):
            state, metadata = comfy.utils.load_torch_file(config.vae, return_metadata=True)
            vae = comfy.sd.VAE(sd=state, metadata=metadata)
            vae.throw_exception_if_invalid()
    if config.clip_vision:
        with reading("clip_vision", config.clip_vision):
            if (vision := comfy.clip_vision.load(config.clip_vision)) is None:
                raise ValueError("ComfyUI knows no image encoder of this kind")
    parts = {"checkpoint or diffusion_model": model, "text_encoders": clip, "vae": vae, "clip_vision": vision}
    if missing := [name for name, part in parts.items() if part is None]:
        raise TrainingError(f"The base model is not complete. Name files for: {', '.join(missing)}.")
    return Base(model, clip, vae, vision)


def fresh_adapter(config: TrainingConfig, base: Base) -> NestedAdapter:
    """A new Q-Former, and W_Kn, W_Vn of each layer that start from its own to_k and to_v."""
    unet = base.model.model.diffusion_model
    sites = cross_attention_sites(unet)
    shape = AdapterConfig(
        image_dim=base.clip_vision.config["hidden_size"],
        dim=config.dim,
        depth=config.depth,
        heads=max(1, config.dim // config.dim_head),
        dim_head=config.dim_head,
        queries=config.queries,
        output_dim=sites[0].context,
        layers=tuple(site.inner for site in sites),
        ff_mult=config.ff_mult,
        feature_layer=config.feature_layer,
        norm=config.norm,
        norm_factor=config.norm_factor,
        class_word=config.class_word,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapter = NestedAdapter(shape)
    with torch.no_grad():
        for site, layer in zip(sites, adapter.layers, strict=True):
            attention = attention_at(unet, site)
            layer.to_k.weight.copy_(plain(attention.to_k.weight))
            layer.to_v.weight.copy_(plain(attention.to_v.weight))
    return adapter


def plain(weight: Tensor) -> Tensor:
    """A weight as numbers, also of a checkpoint that keeps them with scales apart."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def attention_at(unet: nn.Module, site: Site) -> nn.Module:
    name, number, index = site.key
    block = unet.middle_block if name == "middle" else getattr(unet, f"{name}_blocks")[number]
    return next(layer for layer in block if hasattr(layer, "transformer_blocks")).transformer_blocks[index].attn2


@contextmanager
def checkpointed(unet: nn.Module) -> Iterator[None]:
    """Blocks of the UNet keep only their inputs and compute the rest again on the way back; undone afterwards."""
    blocks = [m for m in unet.modules() if isinstance(m, (ResBlock, BasicTransformerBlock))]
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = recomputed(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward")
            if forward is not None:
                block.forward = forward


def recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        # The host goes on writing into its options (which block it is at), so the block keeps its own.
        kwargs = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
