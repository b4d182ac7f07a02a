"""Random weights that behave: every activation stays of the order of one, however deep the model.

They are drawn tensor by tensor from a seed made of the names, and written as they are drawn, so that files
of several GB need no more memory than their largest tensor and come out the same everywhere.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from nested_attention.files import write_atomically

BYTES_PER_VALUE = 2  # fp16
NORM_SPREAD = 0.05
BIAS_SPREAD = 0.02
RESIDUAL_GAIN = 0.3
LOGIT_SCALE = 4.6
SHARP_GAIN = 3.0

EMBEDDINGS = {
    "token_embedding": 0.3,
    "position_embedding": 0.1,
    "positional_embedding": 0.1,
    "class_embedding": 0.3,
    "latents": 0.3,
}
# The last layer of each residual branch, in the names of the UNet, the autoencoder, CLIP, OpenCLIP and the resampler.
RESIDUAL_ENDS = (
    *("to_out.0.weight", "ff.net.2.weight", "out_layers.3.weight", "proj_out.weight", "conv2.weight"),
    *("out_proj.weight", "fc2.weight", "c_proj.weight", "to_out.weight", "1.3.weight"),
)

# An adapter's attentions pick few of many tokens, as trained ones do; flat ones would see hardly any image at all.
SHARP = re.compile(r"resampler\..+\.to_q\.weight|layers\.\d+\.to_k\.weight")

Shapes = Mapping[str, tuple[int, ...]]


def random_tensor(name: str, shape: tuple[int, ...], seed: str) -> torch.Tensor:
    """The weight of this name in the model of this seed, as fp16."""
    if not shape:
        return torch.tensor(LOGIT_SCALE, dtype=torch.float16)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    mean, deviation = _distribution(name, shape)
    return torch.empty(shape).normal_(mean, deviation, generator=generator).to(torch.float16)


def size(shapes: Shapes) -> int:
    """Bytes of a file of these weights, but for the header."""
    return BYTES_PER_VALUE * sum(map(math.prod, shapes.values()))


def write_random(path: Path, shapes: Shapes, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of random fp16 weights; the path exists only once the file is complete."""

    def write(file: BinaryIO) -> None:
        _write_header(file, shapes, metadata or {})
        for name, shape in shapes.items():
            file.write(random_tensor(name, shape, path.stem).numpy().data)

    write_atomically(path, write)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation for a weight."""
    embedding = next((spread for part, spread in EMBEDDINGS.items() if part in name), None)
    if embedding is not None:
        return 0.0, embedding
    if len(shape) == 1:
        return (1.0, NORM_SPREAD) if name.endswith("weight") else (0.0, BIAS_SPREAD)
    return 0.0, _gain(name) / math.sqrt(math.prod(shape[1:]))


def _gain(name: str) -> float:
    if SHARP.fullmatch(name):
        return SHARP_GAIN
    return RESIDUAL_GAIN if name.endswith(RESIDUAL_ENDS) else 1.0


def _write_header(file: BinaryIO, shapes: Shapes, metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * BYTES_PER_VALUE
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
