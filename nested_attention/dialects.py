"""Adapter weights under the names of any known lineage, read into the canonical names of `NestedAdapter`.

Goes by shape and structure: the Q-Former is where the 3-D `latents` stand; nested projections are 2-D pairs whose
names tell key from value. What does not fit is an error that lists it, never a partial load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adapter import AdapterConfig

METADATA_KEY = "nested_attention"
NESTING = 32  # of dicts in dicts: what goes deeper holds itself
DIM_HEAD = 64  # of every published resampler; the shapes alone do not tell it

KEY_OR_VALUE = re.compile(r"(?:^|_)(k|v)(?:_|$)")
RESAMPLER_NAMES = re.compile(
    r"latents|(proj_in|proj_out|norm_out)\.(weight|bias)"
    r"|layers\.\d+\.(0\.norm[12]\.(weight|bias)|0\.to_(q|kv|out)\.weight|1\.0\.(weight|bias)|1\.[13]\.weight)"
)
EXPECTED = (
    "a Q-Former (a resampler with learned `latents` of shape [1, queries, dim]) and, for each cross-attention layer of"
    " the base model, one pair of 2-D nested projections such as `to_k_ip.weight` and `to_v_ip.weight`"
)


class AdapterFileError(ValueError):
    """A file that is no adapter of a known kind."""


def canonical(
    state: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Configuration and `NestedAdapter` state of an adapter file's content, flat or nested.

    Dialects: our own (configuration in the metadata), IP-Adapter files, saved training modules, and their variants.
    Raises AdapterFileError with what was found and what was expected.
    """
    if not isinstance(state, Mapping):
        raise AdapterFileError(f"The file holds a {type(state).__name__}. Expected {EXPECTED}.")
    entries = list(flatten(state))
    tensors = {clean(name): tensor for name, tensor in entries}
    if len(tensors) < len(entries):
        raise AdapterFileError("The adapter holds weights twice, with and without the prefix of a training's wrapper.")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("unet.")}
    if metadata and METADATA_KEY in metadata:
        return AdapterConfig.from_json(metadata[METADATA_KEY]), tensors

    prefix = resampler_prefix(tensors)
    inside = {k for k in tensors if (k.startswith(prefix) if prefix else RESAMPLER_NAMES.fullmatch(k))}
    resampler = {k.removeprefix(prefix): v for k, v in tensors.items() if k in inside}
    pairs = projection_pairs({k: v for k, v in tensors.items() if k not in inside})
    config = infer_config(resampler, pairs)
    renamed = {f"resampler.{k}": v for k, v in resampler.items()}
    for i, (to_k, to_v) in enumerate(pairs):
        renamed |= {f"layers.{i}.to_k.weight": to_k, f"layers.{i}.to_v.weight": to_v}
    return config, renamed


def flatten(state: Mapping[str, Any], prefix: str = ""):
    """Name and tensor of each entry of a state dict, nested or flat; anything but tensors is refused."""
    for name, value in state.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and path.count(".") < NESTING:
            yield from flatten(value, f"{path}.")
        elif isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta":
            yield path, value
        else:
            raise AdapterFileError(f"`{path}` holds a {type(value).__name__}; an adapter file holds only tensors.")


def clean(name: str) -> str:
    """Names as they were before wrappers for distributed or compiled training prefixed them."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def listing(names: Any, most: int = 8) -> str:
    names = sorted(names)
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + rest if names else "nothing"


def resampler_prefix(tensors: Mapping[str, Tensor]) -> str:
    found = [k for k, v in tensors.items() if re.search(r"(^|\.)latents$", k) and v.ndim == 3 and v.shape[0] == 1]
    if len(found) != 1:
        what = "several Q-Formers" if found else "no Q-Former"
        raise AdapterFileError(
            f"This is no Nested Attention adapter: it holds {what}. Expected {EXPECTED}. "
            f"Found {len(tensors)} tensors: {listing(found or tensors)}."
        )
    return found[0].removesuffix("latents")


def projection_pairs(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(to_k, to_v) of each layer in diffusers' order."""
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = {}
    for name, tensor in tensors.items():
        container, kind = split_projection(name)
        if kind is None or tensor.ndim != 2 or kind in layers.get(container, {}):
            unknown[name] = tensor
        else:
            layers.setdefault(container, {})[kind] = tensor
    if unknown:
        raise AdapterFileError(
            f"The adapter holds {len(unknown)} tensors that are part of no known structure: {listing(unknown)}. "
            f"Expected {EXPECTED}."
        )
    for container, pair in layers.items():
        if len(pair) == 1 or pair["k"].shape != pair["v"].shape:
            shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in sorted(pair.items()))
            raise AdapterFileError(f"Layer `{container}` of the adapter holds no pair of equal shapes, but {shapes}.")
    if not layers:
        raise AdapterFileError(f"The adapter holds a Q-Former but no nested projections. Expected {EXPECTED}.")
    return [(layers[name]["k"], layers[name]["v"]) for name in sorted(layers, key=diffusers_order)]


def split_projection(name: str) -> tuple[str, str | None]:
    """Container of a projection's weight, and "k" or "v": ("ip_adapter.1", "k") for ip_adapter.1.to_k_ip.weight."""
    parts = name.removesuffix(".weight").split(".")
    for i in reversed(range(len(parts))):
        if match := KEY_OR_VALUE.search(parts[i]):
            return ".".join(parts[:i] + parts[i + 1 :]), match[1]
    return name, None


def diffusers_order(container: str) -> tuple[int, ...]:
    """Sort key: down, up, mid where blocks are named, the numbers in the name otherwise."""
    section = next((i for i, word in enumerate(("down_blocks", "up_blocks", "mid_block")) if word in container), 0)
    return section, *(int(number) for number in re.findall(r"(?<=[._])\d+|^\d+", container))


def infer_config(resampler: Mapping[str, Tensor], pairs: list[tuple[Tensor, Tensor]]) -> AdapterConfig:
    """Configuration from shapes alone; what shapes do not tell is the method's published default."""
    if unknown := [name for name in resampler if not RESAMPLER_NAMES.fullmatch(name)]:
        raise AdapterFileError(
            f"The adapter's Q-Former is of an unknown kind: it also holds {listing(unknown)}. Expected a Perceiver "
            "resampler with latents, proj_in, layers, proj_out and norm_out."
        )
    try:
        _, queries, dim = resampler["latents"].shape
        inner = resampler["layers.0.0.to_q.weight"].shape[0]
        config = AdapterConfig(
            image_dim=resampler["proj_in.weight"].shape[1],
            dim=dim,
            depth=1 + max(int(name.split(".")[1]) for name in resampler if name.startswith("layers.")),
            heads=max(1, inner // DIM_HEAD),
            dim_head=min(inner, DIM_HEAD),
            queries=queries,
            output_dim=resampler["proj_out.weight"].shape[0],
            ff_mult=resampler["layers.0.1.1.weight"].shape[0] // dim,
            layers=tuple(to_k.shape[0] for to_k, _ in pairs),
        )
    except (KeyError, IndexError, ZeroDivisionError) as missing:
        raise AdapterFileError(f"The adapter's Q-Former lacks {missing}. Expected {EXPECTED}.") from missing
    for i, (to_k, _) in enumerate(pairs):
        if to_k.shape[1] != config.output_dim:
            raise AdapterFileError(
                f"Nested projection {i} reads tokens of width {to_k.shape[1]}, "
                f"but the adapter's Q-Former makes tokens of width {config.output_dim}."
            )
    return config
