"""How a training is doing: the loss on entries kept apart, and pictures by the host's own sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..adapter import NestedAdapter
from ..files import write_atomically
from ..inspection.drawing import to_image
from ..training.config import TrainingConfig
from ..training.pictures import cover
from ..training.samples import Sample
from ..training.trainer import Projector
from .adapters import LoadedAdapter, subject_of
from .apply import apply_subject
from .images import as_rgb
from .objective import DiffusionObjective

STEPS, CFG, SAMPLER, SCHEDULER = 20, 5.0, "euler", "normal"


class Validation:
    """Called with the step and the averaged adapter; writes validation/STEP.png and returns the loss.

    samples   stay the same throughout, with their noise and times, so that the losses can be compared
    shown     the one whose subject is drawn
    picture   the last that was drawn
    """

    def __init__(self, config: TrainingConfig, objective: DiffusionObjective, samples: list[Sample], shown: Sample):
        self.config, self.objective, self.samples, self.shown = config, objective, samples, shown
        self.loaded: LoadedAdapter | None = None
        self.picture: Any = None

    @torch.no_grad()
    def __call__(self, step: int, adapter: NestedAdapter) -> dict[str, float]:
        if self.config.validation_prompts:
            self.picture = self.draw(adapter)
            path = Path(self.config.output) / "validation" / f"{step:07}.png"
            write_atomically(path, lambda file: self.picture.save(file, "PNG"))
        project = Projector(adapter)
        losses = [self.objective(project, [sample]).item() for sample in self.samples]
        return {"validation": sum(losses) / len(losses)} if losses else {}

    def draw(self, adapter: NestedAdapter) -> Any:
        """The subject, and each prompt drawn with it, side by side."""
        crop = cover(as_rgb(self.shown.crop), self.shown.row.bucket)
        prompts = map(self.config.subject_caption, self.config.validation_prompts)
        pictures = [crop, *(self.sample(adapter, prompt) for prompt in prompts)]
        return to_image(torch.cat(pictures, dim=2)[0, ..., :3])

    def sample(self, adapter: NestedAdapter, prompt: str) -> Tensor:
        """One picture [1, H, W, 3] of the subject shown, through Apply Subject and the host's sampler."""
        base, size = self.objective.base, self.shown.row.bucket
        loaded = self.in_host(adapter)
        bound = subject_of(loaded, self.objective.features([self.shown]))
        model, clip = apply_subject(base.model, base.clip, bound, placeholder=self.config.placeholder)
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, ""))
        latent = torch.zeros_like(self.objective.latent(self.shown))
        noise = comfy.sample.prepare_noise(latent, self.config.seed)
        settings = (STEPS, CFG, SAMPLER, SCHEDULER, positive, negative, latent)
        drawn = comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=self.config.seed)
        return cover(base.vae.decode(drawn).cpu(), size)

    def in_host(self, adapter: NestedAdapter) -> LoadedAdapter:
        """The averaged adapter, which is one object throughout, as a model of the host."""
        if self.loaded is None:
            device = next(adapter.parameters()).device
            patcher = ModelPatcher(adapter, load_device=device, offload_device=device)
            self.loaded = LoadedAdapter(patcher, adapter.config, "in training", "in training")
        return self.loaded
