"""Training as a step of the host's graph: pictures come as tensors, progress goes to the node, Cancel ends it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ..files import write_atomically
from ..training.config import TrainingConfig, TrainingError
from ..training.pictures import pixels_of, read_picture
from ..training.progress import loss_curve, read_losses
from .adapters import LoadedAdapter, load_adapter, trainable_copy
from .base import Base
from .connected import require
from .notice import collected_warnings, show
from .train import ADAPTER, train

PREVIEW_SIDE = 512
WARNINGS = 5  # shown at once
SHOW_AFTER = 1.0  # seconds
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass
class Watcher:
    """Shows a training and what it warned of on its node, and lets the host's Cancel in."""

    bar: Any
    node_id: str | None
    warned: list[str]
    done: int = 0
    picture: Any = None
    shown: float = field(default_factory=time.monotonic)

    def __call__(self, step: int, line: str, picture: Any) -> None:
        self.done += 1
        preview = ("JPEG", picture, PREVIEW_SIDE) if picture is not None and picture is not self.picture else None
        self.picture = picture
        if time.monotonic() - self.shown > SHOW_AFTER:
            self.tell(line)
            self.shown = time.monotonic()
        self.bar.update_absolute(step, preview=preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def tell(self, line: str, warning: bool = False) -> None:
        """Under the last warnings: each broken picture is one."""
        show("\n".join([*self.warned[-WARNINGS:], line]), self.node_id, warning)


def train_in_graph(
    config: TrainingConfig, base: Base, *, start: LoadedAdapter | None = None, node_id: str | None = None
) -> int:
    """Train with the base model as it is loaded; returns how many steps were done now.

    Raises ValueError where a part is missing; TrainingError; and the host's interrupt, when what was learnt so far is
    in the output folder.
    """
    require(model=base.model, clip=base.clip, vae=base.vae, clip_vision=base.clip_vision)
    if base.model.is_dynamic() and base.model.cached_patcher_init is None:
        raise TrainingError(
            "A model of this loader cannot be trained on while its weights are fetched on demand. Load it with Load "
            "Checkpoint or Load Diffusion Model, or start ComfyUI with --disable-dynamic-vram."
        )
    # The host may keep weights elsewhere and fetch them layer by layer, which leaves none to train through.
    base = replace(base, model=base.model.clone(disable_dynamic=True))
    comfy.model_management.reset_cast_buffers()  # those of sampling were made in inference mode
    with collected_warnings() as warned:
        watcher = Watcher(comfy.utils.ProgressBar(config.steps), node_id, warned)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                train(config, base, start=start and trainable_copy(start), watch=watcher)
        except InterruptProcessingException:
            watcher.tell(f"Cancelled. What was learnt so far is in {config.output}. Queue again to go on.")
            raise
        finally:
            comfy.model_management.soft_empty_cache()
    watcher.tell(f"{watcher.done} steps, {config.steps} in all. The run is in {config.output}.", warning=bool(warned))
    return watcher.done


def store_pictures(folder: Path, images: Tensor, captions: Sequence[str], crops: Tensor | None) -> Path:
    """Write pictures [B, H, W, C], captions and crops [B, h, w, C] as a data set; returns its .jsonl file.

    Files are named by what they show, so that a training that goes on finds the same ones.
    """
    lines = [{"image": store_picture(folder, i), "caption": c} for i, c in zip(images, captions, strict=True)]
    for line, crop in zip(lines, () if crops is None else crops, strict=crops is not None):
        line["crop"] = store_picture(folder, crop)
    path = folder / "pictures.jsonl"
    write_atomically(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def store_picture(folder: Path, image: Tensor) -> str:
    """Write one picture [H, W, C] as a PNG file and return its path within the folder."""
    from PIL import Image

    height, width, channels = image.shape
    content = (image.cpu().clamp(0, 1) * 255).round().byte().contiguous().numpy().tobytes()
    name = hashlib.sha256(f"{width} {channels} ".encode() + content).hexdigest()[:16]
    path = folder / "pictures" / f"{name}.png"
    if not path.exists():
        picture = Image.frombytes(MODES[channels], (width, height), content)
        write_atomically(path, lambda file: picture.save(file, "PNG"))
    return f"{path.parent.name}/{path.name}"


def trained(folder: Path) -> tuple[LoadedAdapter, Tensor, Tensor]:
    """What a training left in its folder: the adapter, the loss curve and the last sample, [1, H, W, 3] each.

    Without any sample it is a small black picture.
    """
    adapter = load_adapter(str(folder / ADAPTER), f"{folder.name}.safetensors", apart=True)
    curve = pixels_of(loss_curve(read_losses(folder / "loss.jsonl")))
    samples = sorted((folder / "validation").glob("*.png"))
    return adapter, curve, read_picture(samples[-1]) if samples else torch.zeros(1, 64, 64, 3)
