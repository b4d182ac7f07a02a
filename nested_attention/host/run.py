"""One sampling run with subjects: all state of nested attention in the host lives and dies with it.

Sampling begins: subjects' places are written beside the conditioning, nested keys and values are projected, the
cross-attention layers are patched, all in the run's own copy of the model's options. Nothing of the model changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from torch import Tensor

from . import KEY
from .adapters import LoadedAdapter, nested_pair
from .images import EMPTY, differ_in_aspect
from .layers import Site, cross_attention_sites
from .marks import Ledger, Placement
from .notice import show, warn
from .patch import LayerPatch
from .recording import Recording, recording_of
from .rows import REGION_KEY, entry_placements, place_tensor, read_layout, with_bare_text, with_places


def in_main_memory(x: Tensor) -> Tensor:
    """The same there; page-locked for a CUDA GPU, which then fetches it faster and without being waited for."""
    if x.is_cuda and comfy.model_management.MAX_PINNED_MEMORY > 0:
        with suppress(RuntimeError):  # the system allows no more of it
            return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x)
    return x.cpu()


@dataclass(frozen=True, eq=False)
class AppliedSubject:
    """A subject in a model: nested tokens [1, M, C], its adapter, and what the user chose."""

    placeholder: str
    tokens: Tensor
    adapter: LoadedAdapter
    strength: float = 1.0
    token_weight: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    region: Tensor | None = None
    low_memory: bool = False
    competition: float = 0.0
    node_id: str | None = None


Found = dict[str, list[list[list[Placement]]]]
"""Subjects' places in each row of each conditioning entry, by kind of entry."""


@dataclass(frozen=True, eq=False)
class Personalization:
    """The subjects of a model; wraps the host's sampling (WrappersMP.OUTER_SAMPLE)."""

    subjects: tuple[AppliedSubject, ...]
    ledgers: tuple[Ledger, ...]

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        conds, guider.conds = guider.conds, {**guider.conds}
        try:
            return self.sample(executor, *args, **kwargs)
        finally:
            guider.conds = conds  # some packs sample several times within one run of the host's

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        noise = args[0] if args else kwargs["noise"]
        strongest = max(subject.competition for subject in self.subjects)
        shown = [s for s in self.subjects if s.strength and s.start_percent < s.end_percent]
        subjects = [replace(subject, competition=strongest) for subject in shown]
        for subject in self.subjects:
            if subject.start_percent >= subject.end_percent:
                warn(
                    f"{subject.placeholder} begins at {subject.start_percent:g} of the sampling and ends at "
                    f"{subject.end_percent:g}, so the picture does not show its subject. Raise end_percent.",
                    subject.node_id,
                )
        guider = executor.class_obj
        ledger = {digest: section for ledger in self.ledgers for digest, section in ledger.sections.items()}
        found = {kind: [entry_placements(entry, ledger) for entry in entries] for kind, entries in guider.conds.items()}
        for kind, entries in guider.conds.items():
            guider.conds[kind] = [with_bare_text(entry, ledger) for entry in entries]
        if subjects and (placed := self.write_places(guider, found, subjects, noise)):
            run = Run(guider.model_patcher, subjects, recording_of(guider.model_patcher))
            run.install(guider.model_options)
            sigmas = args[3] if len(args) > 3 else kwargs["sigmas"]  # the host's outer_sample has them fourth
            run.tell_idle(sigmas, placed)
            with run.uncompiled():
                return executor(*args, **kwargs)
        return executor(*args, **kwargs)

    def write_places(self, guider: Any, found: Found, subjects: list[AppliedSubject], noise: Tensor) -> set[str]:
        """Write subjects' places beside every conditioning entry. Returns the placeholders that any entry holds."""
        by_kind = {kind: {p.placeholder for e in rows for row in e for p in row} for kind, rows in found.items()}
        present = set().union(*by_kind.values())
        avoided = present.difference(*(names for kind, names in by_kind.items() if kind != "negative"))
        for subject in subjects:
            if subject.placeholder in avoided:
                show(
                    f"{subject.placeholder} stands in the negative prompt alone, so the picture does not show its "
                    "subject.",
                    subject.node_id,
                )
            elif subject.placeholder in present:
                # Also takes the place of a warning of an earlier run.
                show(f"{subject.placeholder} stands in the prompt.", subject.node_id)
            else:
                warn(
                    f"No prompt holds {subject.placeholder}, so the picture does not show its subject. Write "
                    f"{subject.placeholder} into the positive prompt, encoded with the CLIP of Apply Subject. If it "
                    "is there, a node between takes it out (an average of two prompts may), or encodes in a way of "
                    "its own.",
                    subject.node_id,
                )
        if strange := sorted(present - {subject.placeholder for subject in self.subjects}):
            warn(
                f"The prompt holds {', '.join(strange)}, whose subject this model does not have, so the picture does "
                "not show it. Take both model and CLIP from the last Apply Subject of the chain.",
                self.subjects[-1].node_id,
            )
        numbers = {subject.placeholder: i for i, subject in enumerate(subjects)}
        if not (placed := present & numbers.keys()):
            return placed
        regions = region_masks(subjects, noise)
        for kind, entries in guider.conds.items():
            guider.conds[kind] = [
                with_places(entry, place_tensor(entry, rows, numbers), regions)
                for entry, rows in zip(entries, found[kind], strict=True)
            ]
        return placed


def region_masks(subjects: list[AppliedSubject], noise: Tensor) -> Tensor | None:
    """[B, S, h, w] at the latent's size, or None where no subject has a region; B is 1, or as many as masks came."""
    if all(subject.region is None for subject in subjects):
        return None
    size = noise.shape[-2:]
    for subject in subjects:
        if subject.region is not None:
            check_region(subject, subject.region.reshape(-1, *subject.region.shape[-2:]), len(noise), size)
    masks = [torch.ones(1, *size) if s.region is None else s.region.cpu().float().clamp(0, 1) for s in subjects]
    fitted = [F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size, mode="area") for mask in masks]
    count = max(map(len, fitted))
    return torch.cat([comfy.utils.repeat_to_batch_size(mask, count) for mask in fitted], dim=1)


def check_region(subject: AppliedSubject, masks: Tensor, pictures: int, size: tuple[int, int]) -> None:
    """Say what is odd about a subject's masks [M, H, W] for so many latents of this size."""
    if differ_in_aspect(masks.shape, size):
        warn(
            f"The region of {subject.placeholder} is of another shape than the picture that is sampled, and is "
            "stretched over it. Paint it on a picture of the same shape; for parts of a picture (face detailers, "
            "upscalers by tiles), use an Apply Subject without region.",
            subject.node_id,
        )
    if len(masks) not in (1, pictures):
        warn(
            f"The region of {subject.placeholder} is {len(masks)} masks for {pictures} pictures: they are used in "
            "turn, from the first on. Connect one, or one for each.",
            subject.node_id,
        )
    if masks.max() < EMPTY:
        warn(
            f"The region of {subject.placeholder} is empty, so its subject shows nowhere. Paint one, or leave "
            "region unconnected.",
            subject.node_id,
        )


@dataclass(eq=False)
class Run:
    """State of one run.

    pairs     nested keys and values by subject and layer, where the adapter is, or with low memory on the CPU
    copies    of them on the devices of further UNets
    reached   layers that the sampling went through
    """

    model: ModelPatcher
    subjects: list[AppliedSubject]
    recording: Recording | None = None
    sites: list[Site] = field(init=False)
    reached: set[int] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    copies: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = cross_attention_sites(self.model.model.diffusion_model)
        sampling = self.model.get_model_object("model_sampling")
        self.sigmas = [tuple(map(sampling.percent_to_sigma, (s.start_percent, s.end_percent))) for s in self.subjects]
        # As loading will set it: other nodes may change it by a patch.
        self.dtype = self.model.get_model_object("manual_cast_dtype") or self.model.model.get_dtype()
        self.scheduled = any(s.start_percent > 0 or s.end_percent < 1 for s in self.subjects)
        self.project()

    def project(self) -> None:
        """Project every subject's nested keys and values, before the host makes room for the UNet."""
        # Of several that were loaded from one file, one goes to the device.
        shared = {subject.adapter.fingerprint: subject.adapter.patcher for subject in self.subjects}
        patchers = [shared[subject.adapter.fingerprint] for subject in self.subjects]
        kept = sum(subject.tokens.shape[1] for subject in self.subjects if not subject.low_memory)
        size = 2 * kept * sum(site.inner for site in self.sites) * self.dtype.itemsize
        comfy.model_management.load_models_gpu(list(shared.values()), memory_required=size)
        progress = comfy.utils.ProgressBar(len(patchers) * len(self.sites))
        for i, (subject, patcher) in enumerate(zip(self.subjects, patchers, strict=True)):
            tokens = subject.tokens.to(patcher.load_device, torch.float32)
            numbers = torch.ones((), dtype=torch.bool, device=tokens.device)
            for layer, site in enumerate(self.sites):
                comfy.model_management.throw_exception_if_processing_interrupted()
                with torch.no_grad():
                    pair = nested_pair(patcher.model, layer, tokens, site.heads, self.dtype)
                numbers &= pair[0].isfinite().all() & pair[1].isfinite().all()
                self.pairs[i, layer] = tuple(map(in_main_memory, pair)) if subject.low_memory else pair
                progress.update(1)
            if not numbers:
                raise ValueError(
                    f"The values of {subject.placeholder} are no numbers in {str(self.dtype).removeprefix('torch.')}: "
                    f"the adapter '{subject.adapter.name}' is damaged, or made for a model of another precision."
                )

    def nested(self, subject: int, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Kn and Vn of a subject in a layer, on the device and in the precision of its queries."""
        pair = self.pairs[subject, layer]
        if pair[0].device != q.device:
            if self.subjects[subject].low_memory:
                ahead = comfy.model_management.device_supports_non_blocking(q.device)
                return tuple(x.to(q.device, q.dtype, non_blocking=ahead) for x in pair)
            key = (subject, layer, q.device)
            pair = self.copies[key] = self.copies.get(key) or tuple(x.to(q.device) for x in pair)
        return tuple(x.to(q.dtype) for x in pair)

    def install(self, model_options: dict[str, Any]) -> None:
        """Patch the layers in the run's own copy of the model's options, around whatever other packs put there."""
        options = model_options["transformer_options"]
        replace = options["patches_replace"] = {**options.get("patches_replace", {})}
        there = replace.get("attn2", {})
        layers = {}
        for index, site in enumerate(self.sites):
            before = there.get(site.key, there.get(site.key[:2]))
            # Some packs sample several times within one run of the host's.
            layers[site.key] = LayerPatch(self, index, before.previous if isinstance(before, LayerPatch) else before)
        replace["attn2"] = {**there, **layers}
        options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).pop(KEY, None)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model, model_options, is_model_options=True)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Leaves compiled code out, in all threads, as the setting is the process's.

        The host compiles without guards on options: compiled code would keep what patches read when it was traced.
        Raises RuntimeError where this PyTorch cannot leave it out.
        """
        set_stance = getattr(torch.compiler, "set_stance", None)  # from PyTorch 2.6 on
        if TORCH_COMPILE_KWARGS in self.model.model_options:
            if set_stance is None:
                raise RuntimeError(
                    f"Subjects and torch.compile need PyTorch 2.6 or newer, and this is {torch.__version__}: it would "
                    "go on drawing what was compiled first. Bypass the node that compiles the model, or update PyTorch."
                )
            self.say("torch.compile is left out while a subject is in the prompt: it would keep an earlier one.")
        return set_stance("force_eager") if set_stance else nullcontext()

    def apply_model(self, executor: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Wraps each call of the UNet: turns the batch's tensor of places into a layout for the layers."""
        places, regions = kwargs.pop(KEY, None), kwargs.pop(REGION_KEY, None)
        if places is None:
            self.say("Another node calls the model without its conditioning, so the subjects do not show there.")
            return executor(*args, **kwargs)
        # transformer_options is the sixth argument of the host's apply_model.
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        call = None if self.recording is None else self.recording.call(self, args[0], options)
        if regions is not None:
            regions = regions.to(args[0].device)  # which the host does only further in
        layout = read_layout(places, regions, self.active(options), call)
        options = {**options, KEY: layout}
        if len(args) > 5:
            args = (*args[:5], options, *args[6:])
        else:
            kwargs["transformer_options"] = options
        result = executor(*args, **kwargs)
        if layout.groups:
            self.check_reached()
        return result

    def active(self, options: dict[str, Any]) -> list[int]:
        """Subjects whose range of steps holds this one; asks the device for the sigma only where one has a range."""
        if not self.scheduled:
            return list(range(len(self.subjects)))
        sigma = float(options["sigmas"].max())
        return [i for i, (start, end) in enumerate(self.sigmas) if end <= sigma <= start]

    def tell_idle(self, sigmas: Tensor, placed: set[str]) -> None:
        """Say whose range of steps, of those in the prompt, holds none of a sampler's."""
        for subject, (start, end) in zip(self.subjects, self.sigmas, strict=True):
            if subject.placeholder in placed and not ((sigmas[:-1] >= end) & (sigmas[:-1] <= start)).any():
                show(
                    f"None of this sampler's steps lies within {subject.placeholder}'s, which are from "
                    f"{subject.start_percent:g} to {subject.end_percent:g} of the whole sampling: it draws the plain "
                    "class word.",
                    subject.node_id,
                )

    def check_reached(self) -> None:
        missing = [str(site) for i, site in enumerate(self.sites) if i not in self.reached]
        if missing and "aside" not in self.said:
            self.say(
                f"{len(missing)} of {len(self.sites)} cross-attention layers were not reached, so the subject is "
                f"weaker than it should be: {'; '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}. Another node "
                "replaces attention there."
            )

    def stand_aside(self, misfit: str) -> None:
        self.say(
            f"Another node rearranges attention to {misfit}. The subjects cannot be placed there: use one or the "
            "other.",
            once="aside",
        )

    def say(self, text: str, once: str | None = None) -> None:
        if (once or text) not in self.said:
            self.said.add(once or text)
            warn(text, self.subjects[0].node_id)
