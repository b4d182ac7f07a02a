"""The cross-attention layers of a loaded UNet, found in the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..adapter import AdapterConfig
from ..base_models import describe


@dataclass(frozen=True)
class Site:
    """One cross-attention layer: its key among the host's patches, and its widths."""

    key: tuple[str, int, int]
    inner: int
    context: int
    heads: int

    def __str__(self) -> str:
        return "{} block {}, transformer {}".format(*self.key)


def cross_attention_sites(unet: nn.Module) -> list[Site]:
    """Every cross-attention layer in the order of adapter files (diffusers': down, up, mid).

    Raises ValueError where the model is no UNet of the Stable Diffusion family.
    """
    if not hasattr(unet, "input_blocks"):
        raise ValueError(
            f"Nested Attention works with UNets of the Stable Diffusion family (SD 1.5, SDXL and their kin); "
            f"this model is a {type(unet).__name__}."
        )
    blocks = [("input", i, block) for i, block in enumerate(unet.input_blocks)]
    blocks += [("output", i, block) for i, block in enumerate(unet.output_blocks)]
    blocks += [("middle", 0, unet.middle_block)] if unet.middle_block is not None else []
    return [site for name, number, block in blocks for site in sites_of(name, number, block)]


def sites_of(name: str, number: int, block: nn.Module) -> Iterator[Site]:
    for layer in block.children():
        for i, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
            attention = transformer.attn2
            if attention is not None:
                to_k = attention.to_k
                yield Site((name, number, i), to_k.out_features, to_k.in_features, attention.heads)


def check_fit(config: AdapterConfig, sites: list[Site], adapter_name: str) -> None:
    """Raise ValueError, with layer, shapes and base models, where an adapter was made for another model."""
    context = sites[0].context if sites else 0
    made_for = describe(config.layers, config.output_dim)
    model_is = describe([site.inner for site in sites], context)
    if len(config.layers) != len(sites):
        problem = f"it has {len(config.layers)} layers, the model has {len(sites)}"
    else:
        pairs = zip(config.layers, sites, strict=True)
        wrong = [(inner, s) for inner, s in pairs if (s.inner, s.context) != (inner, config.output_dim)]
        if not wrong:
            return
        inner, site = wrong[0]
        problem = (
            f"at {site} it projects from {config.output_dim} to {inner}, the model there from "
            f"{site.context} to {site.inner} ({len(wrong)} of {len(sites)} layers differ)"
        )
    raise ValueError(
        f"The adapter '{adapter_name}' was made for {made_for}, but the model is {model_is}: {problem}. "
        "Load the adapter that was made for this base model, or the checkpoint that belongs to the adapter."
    )
