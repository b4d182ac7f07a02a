"""Adapters under ComfyUI's management: read from files, loaded and freed like any model of the host."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..adapter import AdapterConfig, FeatureLayer, NestedAdapter, fingerprint
from ..attention import Norm, split_heads
from ..dialects import METADATA_KEY, AdapterFileError
from ..files import build_adapter, write_tensors
from ..subject import Subject, join_photos


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in the host's memory management; `config` holds the user's choices over the file's."""

    patcher: ModelPatcher
    config: AdapterConfig
    name: str
    fingerprint: str


@dataclass(frozen=True, eq=False)
class BoundSubject:
    """A subject with the adapter that made it."""

    subject: Subject
    adapter: LoadedAdapter


def load_adapter(
    path: str, name: str, *, feature_layer: FeatureLayer | None = None, norm: Norm | None = None, apart: bool = False
) -> LoadedAdapter:
    """Read an adapter file in any dialect; None leaves a choice to the adapter.

    apart   keep nothing of the file, which is mapped else: Windows lets nobody write a mapped file again
    """
    patcher = adapter_patcher(path, apart)
    config = patcher.model.config
    config = replace(config, feature_layer=feature_layer or config.feature_layer, norm=norm or config.norm)
    return LoadedAdapter(patcher, config, name, fingerprint(patcher.model.state_dict()))


def save_adapter(adapter: LoadedAdapter, path: str) -> None:
    """Write an adapter in the own format, in its precision, with the user's choices and the notes of its own file."""
    module = adapter.patcher.model
    write_tensors(path, module.state_dict(), {**module.notes, METADATA_KEY: adapter.config.to_json()})


def trainable_copy(adapter: LoadedAdapter) -> NestedAdapter:
    """The same adapter in fp32 on the CPU, apart from the host."""
    copy = NestedAdapter(adapter.config)
    copy.load_state_dict(adapter.patcher.model.state_dict())
    return copy


def adapter_patcher(path: str, apart: bool) -> ModelPatcher:
    """An adapter file as a model of the host."""
    state, metadata = read_weights(path)
    state = {name: value.clone() for name, value in state.items()} if apart else state
    try:
        adapter = build_adapter(state, metadata or {}, operations=comfy.ops.manual_cast)
    except ValueError as error:
        raise AdapterFileError(f"{Path(path).name}: {error}") from error
    # Looked up now: the host chooses its class of patchers after start.
    return comfy.model_patcher.CoreModelPatcher(
        adapter,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def read_weights(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises AdapterFileError where it cannot be read."""
    try:
        return comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except (MemoryError, PermissionError):  # which say what it is
        raise
    except Exception as error:  # each format has errors of its own, and none names the file
        if holds_objects(error):
            raise AdapterFileError(
                f"{Path(path).name} holds Python objects beside its weights, which could run code and are not loaded. "
                "Ask its author for the weights alone, best as .safetensors."
            ) from error
        raise AdapterFileError(
            f"{Path(path).name} cannot be read: {reason_of(error)}. It is damaged, not completely downloaded, or no "
            "weights at all (a web page saved under its name, say). Download it again."
        ) from error


def holds_objects(error: Exception) -> bool:
    """Whether PyTorch refused a file for Python objects in it."""
    said = str(error)
    return isinstance(error, pickle.UnpicklingError) and ("global" in said.lower() or "blocked" in said)


def reason_of(error: Exception) -> str:
    """Why a file could not be read. What PyTorch says of pickles is how to load them all the same, so not that."""
    if holds_objects(error):
        return "it holds Python objects, which could run code"
    if isinstance(error, pickle.UnpicklingError):
        return "no tensors were found in it"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def bind(subject: Subject, adapter: LoadedAdapter) -> BoundSubject:
    """Raises ValueError where another adapter made the subject."""
    if subject.adapter != adapter.fingerprint:
        raise ValueError(
            f"This subject was made by another adapter ('{subject.adapter_name}', fingerprint {subject.adapter}) than "
            f"'{adapter.name}' (fingerprint {adapter.fingerprint}). Load the adapter that made it, or encode the photo "
            "again with this one."
        )
    if (width := subject.tokens.shape[-1]) != adapter.config.output_dim:
        raise ValueError(f"The subject's tokens are {width} wide, those of its adapter {adapter.config.output_dim}.")
    return BoundSubject(subject, adapter)


def nested_tokens(adapter: LoadedAdapter, features: Tensor) -> Tensor:
    """Nested tokens [B, M, C] of image features [B, I, image_dim], in fp32 on the host's intermediate device."""
    comfy.model_management.load_models_gpu([adapter.patcher])
    progress = comfy.utils.ProgressBar(len(features))
    tokens = []
    for photo in features.to(adapter.patcher.load_device, torch.float32).split(1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        with torch.no_grad():
            tokens.append(adapter.patcher.model.resampler(photo).to(comfy.model_management.intermediate_device()))
        progress.update(1)
    found = torch.cat(tokens)
    if not found.isfinite().all():
        raise ValueError(
            f"The adapter '{adapter.name}' makes of this photo values that are no numbers. Either a node before made "
            "some in the photo (NaN), or the adapter is damaged: try another photo."
        )
    return found


def subject_of(adapter: LoadedAdapter, features: Tensor, photos: str = "concatenate") -> BoundSubject:
    """The subject of photos with these image features [B, I, image_dim]; `photos` as `how` of join_photos."""
    tokens = join_photos(nested_tokens(adapter, features), photos)
    return BoundSubject(Subject(tokens, adapter.fingerprint, adapter.name), adapter)


def nested_pair(
    adapter: NestedAdapter, layer: int, tokens: Tensor, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Kn and Vn of one layer, [1, H, M, D]; projected in the tokens' fp32, kept in the model's precision."""
    keys, values = adapter.layers[layer](tokens)
    return split_heads(keys.to(dtype), heads), split_heads(values.to(dtype), heads)
