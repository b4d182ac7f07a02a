"""The loss to train adapters on: the frozen base model, personalised by the very functions of sampling."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.samplers
import torch
from comfy.sampler_helpers import convert_cond
from torch import Tensor

from ..adapter import NestedAdapter
from ..attention import NestedToken, split_heads
from ..training.cache import Cache, Tensors, cache_key
from ..training.config import TrainingConfig, TrainingError
from ..training.gain import add_gain
from ..training.loss import diffusion_loss, loss_weight, snr_of
from ..training.pictures import covering
from ..training.samples import Sample
from ..training.trainer import Pairs, Project, Projector
from ..training.troubles import Troubles
from . import KEY
from .base import DTYPES, Base, encoders_fingerprint
from .images import as_rgb, features, fit
from .layers import Site, cross_attention_sites
from .marks import Placement
from .patch import OVERRIDE, LayerPatch
from .rows import Layout, Rows, entry_placements, place_tensor, read_layout, with_places
from .text import add_placeholder

LARGEST = 100.0  # factor on the values of a head that attends to the subject hardly anywhere


@dataclass(frozen=True)
class TrainedSubject:
    """What a layer asks of a subject, as it is by default in sampling."""

    adapter: NestedAdapter
    strength: float = 1.0
    token_weight: float = 1.0
    competition: float = 0.0


@dataclass
class BatchRun:
    """One batch in the place of a sampling run: its subjects are groups of rows with the token at the same columns."""

    sites: list[Site]
    subjects: list[TrainedSubject]
    groups: list[slice]
    pairs: Pairs
    reached: set[int] = field(default_factory=set)

    def nested(self, subject: int, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Kn and Vn of a group's rows, [rows, H, M, D], in the precision of the queries."""
        rows, heads = self.groups[subject], self.sites[layer].heads
        keys, values = (split_heads(x[rows].to(q.dtype), heads) for x in self.pairs[layer])
        return keys, values

    def stand_aside(self, rows: int, columns: int, layout: Layout) -> None:
        raise TrainingError(
            f"A patch of the model rearranges attention to {rows} rows of {columns} text tokens where the batch has "
            f"{layout.rows} of {layout.columns}. Train on the model without it."
        )


@dataclass(frozen=True)
class Batch:
    """Noised latents, all that the UNet is given beside them, and the image features [B, I, image_dim] to train on."""

    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    conds: dict[str, Any]
    layout: Layout
    groups: list[slice]
    features: Tensor


@dataclass
class Attended:
    """Watches a batch: p_s, the attention to the subject's token, of each layer's heads, averaged over places."""

    shares: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def layer(
        self, index: int, rows: Rows, part: list[Tensor], tokens: list[NestedToken], options: dict[str, Any]
    ) -> Callable[[Tensor], None]:
        return lambda p: self.shares[index].append(p.sum(-1).mean(2))


class DiffusionObjective:
    """Loss of samples: noise is added, the personalised UNet predicts the clean picture, the error is weighted."""

    def __init__(self, base: Base, adapter: NestedAdapter, config: TrainingConfig, troubles: Troubles | None = None):
        self.base, self.adapter, self.config = base, adapter, config
        self.cache = Cache(config.cache, Path(config.output) / "cache", troubles or Troubles(config.on_error))
        self.sites = cross_attention_sites(base.model.model.diffusion_model)
        self.clip, self.ledger = add_placeholder(base.clip, config.placeholder, config.class_word, {})
        self.sampling = base.model.get_model_object("model_sampling")
        self.device = base.model.load_device
        if base.model.model_options["transformer_options"].get("patches_replace", {}).get("attn2"):
            raise TrainingError("Another node replaces the model's cross-attention. Train on the model without it.")
        # Only files outlive the models, and telling these apart takes a look at all of their weights.
        self.identity = encoders_fingerprint(base) if config.cache == "disk" else ""

    def __call__(self, project: Project, samples: Sequence[Sample]) -> Tensor:
        batch = self.prepare(samples)
        dtype = DTYPES[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            pairs = project(batch.features)
        denoised = self.denoise(batch, pairs)
        return diffusion_loss(denoised, batch.clean, self.weight(batch.sigma))

    @torch.no_grad()
    def prepare(self, samples: Sequence[Sample]) -> Batch:
        latents = [self.latent(s) for s in samples]
        entries = [self.text(s, latent) for s, latent in zip(samples, latents, strict=True)]
        # Rows whose subject stands at the same columns go through attention together.
        order = sorted(range(len(samples)), key=lambda i: entries[i][1])
        keys = [entries[i][1] for i in order]
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        groups = [slice(keys.index(key), keys.index(key) + keys.count(key)) for key in numbers]
        conds = self.join([self.placed(entries[i], numbers[entries[i][1]]) for i in order])
        layout = read_layout(conds.pop(KEY), None, range(len(groups)))

        samples, clean = [samples[i] for i in order], torch.cat([latents[i] for i in order]).to(self.device)
        sigma = torch.cat([self.draw_sigma(s) for s in samples]).to(self.device)
        noise = [torch.randn(clean[:1].shape, generator=s.row.generator("noise")) for s in samples]
        noisy = self.sampling.noise_scaling(sigma, torch.cat(noise).to(self.device), clean)
        seen = self.features(samples).to(self.device, torch.float32)
        comfy.model_management.load_models_gpu([self.base.model], force_full_load=True)
        return Batch(clean, noisy, sigma, conds, layout, groups, seen)

    def latent(self, sample: Sample) -> Tensor:
        """[1, C, h, w] in the model's own scale, on the CPU."""
        content = "" if self.config.cache == "off" else cache_key(sample.picture)
        # VAEs draw from a distribution: what is kept must be the same whenever and in whichever order it is made.
        seed = int(content[:15], 16) if content else sample.row.seed

        def encode() -> Tensors:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                return {"latent": self.base.vae.encode(as_rgb(sample.picture)).float().cpu()}

        found = self.cache.get(cache_key("latent", self.identity, content), encode)
        return self.base.model.model.process_latent_in(found["latent"])

    def text(self, sample: Sample, latent: Tensor) -> tuple[dict[str, Any], tuple]:
        """The host's conditioning of a caption; its length, and the subject's columns in it with their weights."""
        caption = re.sub(r"(?<!\\)[()]", r"\\\g<0>", sample.caption)  # which would be weights in a prompt
        key = cache_key("text", self.identity, caption, self.config.placeholder, self.config.class_word)
        found = dict(self.cache.get(key, lambda: self.encode(caption)))
        places = tuple((int(column), weight) for column, weight in found.pop("places").tolist())
        entries = convert_cond([[found.pop("states"), found]])
        entries[0] |= told_sizes(sample)
        encode = self.base.model.model.extra_conds
        [entry] = comfy.samplers.encode_model_conds(encode, entries, latent, self.device, "positive")
        return entry, (entry["cross_attn"].shape[1], places)

    def encode(self, caption: str) -> Tensors:
        """The text states [1, T, C], what the host adds to them, and the subject's columns and weights, [n, 2]."""
        [states, added], *_ = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))
        [placements] = entry_placements({**added, "cross_attn": states}, {})
        self.ledger.sections.clear()  # which are kept for other nodes, and there are none
        places = torch.tensor([(p.column, p.weight) for p in placements]).reshape(-1, 2)
        tensors = {name: value.cpu() for name, value in added.items() if isinstance(value, Tensor)}
        return {**tensors, "states": states.cpu(), "places": places}

    def placed(self, entry: tuple[dict[str, Any], tuple], number: int) -> dict[str, Any]:
        """A caption's conditioning with its subject's number beside the text."""
        conditioning, (_, places) = entry
        name = self.config.placeholder
        placements = [[Placement(name, column, weight) for column, weight in places]]
        return with_places(conditioning, place_tensor(conditioning, placements, {name: number}), None)

    def join(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch of the entries, put together by the host's own rules for contexts of different lengths."""
        parts = [{k: c.process_cond(batch_size=1) for k, c in entry["model_conds"].items()} for entry in entries]
        return comfy.samplers.cond_cat(parts)

    def draw_sigma(self, sample: Sample) -> Tensor:
        sigmas = self.sampling.sigmas
        return sigmas[torch.randint(len(sigmas), (1,), generator=sample.row.generator("time")).to(sigmas.device)]

    def features(self, samples: Sequence[Sample]) -> Tensor:
        """[B, I, image_dim] of the crops as Encode Subject makes them; zeros for nobody in particular."""
        side = self.base.clip_vision.image_size
        crops = torch.cat([fit(as_rgb(s.crop), side, self.config.fit) for s in samples])
        found = features(self.base.clip_vision, crops, self.adapter.config)
        return found * torch.tensor([s.subject for s in samples], device=found.device).view(-1, 1, 1)

    def denoise(self, batch: Batch, pairs: Pairs) -> Tensor:
        """The clean latents that the personalised UNet predicts, [B, C, h, w]."""
        run = BatchRun(self.sites, [TrainedSubject(self.adapter)] * len(batch.groups), batch.groups, pairs)
        patches = {site.key: LayerPatch(run, layer) for layer, site in enumerate(self.sites)}
        options = {**self.base.model.model_options["transformer_options"], KEY: batch.layout, OVERRIDE: differentiable}
        options["patches_replace"] = {**options.get("patches_replace", {}), "attn2": patches}
        model = self.base.model.model
        denoised = model.apply_model(batch.noisy, batch.sigma, transformer_options=options, **batch.conds)
        if len(run.reached) < len(self.sites):
            raise TrainingError(f"Only {len(run.reached)} of the model's {len(self.sites)} layers were personalised.")
        return denoised

    @torch.no_grad()
    def enlarge_values(self, samples: Sequence[Sample]) -> None:
        """Scale up W_Vn, and its learning rate with it, in heads that samples show to attend little to the subject.

        A share p_s of the attention passes p_s of the values: where that is 1 %, values of the usual size change next
        to nothing, and learn as slowly.
        """
        batch, seen = self.prepare(samples), Attended()
        self.denoise(replace(batch, layout=replace(batch.layout, watch=seen)), Projector(self.adapter)(batch.features))
        for index, (site, layer) in enumerate(zip(self.sites, self.adapter.layers, strict=True)):
            factors = (self.config.value_share / torch.cat(seen.shares[index]).mean(0)).clamp(1, LARGEST)
            add_gain(layer.to_v, factors.repeat_interleave(site.inner // site.heads))

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of each row's error, from what the host's sampling makes of a one and a zero at its noise."""
        ones = torch.ones(len(sigma), 1, 1, 1, device=sigma.device)
        zeros = torch.zeros_like(ones)
        signal, noise = (self.sampling.noise_scaling(sigma, *pair) for pair in ((zeros, ones), (ones, zeros)))
        scale = self.sampling.calculate_denoised(sigma, ones, zeros)
        return loss_weight(scale.flatten(), snr_of(signal, noise).flatten(), self.config.min_snr_gamma)


def told_sizes(sample: Sample) -> dict[str, int]:
    """SDXL's micro-conditioning (Podell et al. 2023, section 2.2): by default the host tells the size of the latents.

    So it is for pictures at least as large. Smaller ones are blurred, and others lack a part at the sides: where that
    is told, the adapter does not learn it.
    """
    resized, (left, top) = covering(sample.size, sample.row.bucket)
    width, height = map(min, sample.size, resized)
    target_width, target_height = sample.row.bucket
    told = {"width": width, "height": height, "crop_w": left, "crop_h": top}
    return {**told, "target_width": target_width, "target_height": target_height}


def differentiable(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The host's attention in PyTorch, in place of one that may have no gradient."""
    return host_attention.attention_pytorch(*args, **kwargs)
