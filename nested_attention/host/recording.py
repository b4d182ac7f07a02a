"""Records what sampling attends to: a wrapper of the host's sampling, and the layers' side of it.

A recording belongs to one model and holds its last run. It only listens: the layers hand it what they have computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..attention import NestedToken, merge_heads
from ..inspection.record import Record, chosen_steps, is_wanted
from .layers import Site
from .notice import show

if TYPE_CHECKING:
    from .rows import Rows
    from .run import AppliedSubject, Run

RECORD_KEY = "nested_attention_record"
Prompt = dict[str, dict[str, Any]]


def record_model(model: Any, **choices: Any) -> tuple[Any, Recording]:
    """A clone of the model whose runs are recorded, and the recording; `choices` are Recording's."""
    chosen_steps(choices.get("steps", "all"), 1)
    recording = Recording(**choices)
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, RECORD_KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RECORD_KEY, recording)
    return model, recording


def recording_of(model: Any) -> Recording | None:
    return next(iter(model.get_wrappers(WrappersMP.OUTER_SAMPLE, RECORD_KEY)), None)


@dataclass(eq=False)
class Recording:
    """The last run of a model (WrappersMP.OUTER_SAMPLE).

    steps, layers   what is recorded, as `chosen_steps` and `is_wanted` read it
    picture         which picture of the batch
    limit           bytes
    subjects, sites, dtype   of the run, as its layers had them
    total, seed     of the run
    partial         calls that were not recorded because they held only a part of the picture
    merged          layers that were not because another node merges places of the picture there
    times           how often the node sampled in this `job`, as upscalers by tiles and detailers do for each part
    sampler         the node that sampled; `graph` says all that made it, once somebody has looked
    """

    steps: str = "all"
    layers: str = ""
    picture: int = 0
    limit: int = 512 * 2**20
    node_id: str | None = None
    record: Record = field(init=False)
    subjects: list[AppliedSubject] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    times: int = 0
    job: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        self.begin((0, 0, 0, 0), None)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        noise = args[0] if args else kwargs["noise"]
        # seed is the eighth argument of the host's outer_sample.
        self.begin(tuple(noise.shape), args[7] if len(args) > 7 else kwargs.get("seed"))
        result = executor(*args, **kwargs)
        self.complete = True
        show(self.summary(), self.node_id)
        return result

    def begin(self, shape: tuple[int, ...], seed: int | None) -> None:
        """Forget the run before."""
        self.record = Record(self.limit)
        self.subjects, self.sites = [], []
        self.pictures, self.size, self.seed = shape[0], shape[-2:], seed
        self.shown = min(self.picture, max(self.pictures - 1, 0))
        self.total, self.partial, self.complete = 0, 0, False
        self.merged: set[int] = set()
        context = get_executing_context()
        self.sampler = None if context is None else context.node_id
        job = context and (context.prompt_id, context.node_id)
        self.times, self.job = self.times + 1 if job and job == self.job else 1, job
        self.graph: str | None = None

    def call(self, run: Run, x: Tensor, options: dict[str, Any]) -> Call | None:
        """Listener for one call of the UNet with the batch x, or None where it is not to be recorded."""
        self.subjects, self.sites, self.dtype = run.subjects, run.sites, run.dtype
        step, self.total = step_of(options)
        if tuple(x.shape[-2:]) != self.size or len(x) % self.pictures:
            self.partial += 1
            return None
        return Call(self, step) if step in chosen_steps(self.steps, self.total) else None

    def summary(self) -> str:
        """The run in words, for the node."""
        if not self.record.maps:
            return f"Nothing was recorded. {self.why_empty()}"
        record, layers = self.record, self.record.layers()
        text = (
            f"{len(record.steps())} of {self.total} steps, {len(layers)} of {len(self.sites)} layers, "
            f"{record.used / 2**20:.1f} MB of at most {self.limit / 2**20:.0f}."
        )
        if record.left_out or record.lost:
            text += (
                f" The limit left out the queries of {len(record.left_out)} layers (values and points are not shown "
                f"there) and {record.lost} attention maps: raise it, or record fewer layers."
            )
        if self.times > 1:
            text += f" The node sampled {self.times} times; this is the last of them."
        if self.partial:
            text += (
                f" {self.partial} calls of the model held a part of the picture (areas, tiles) or of the batch and "
                "were left out."
            )
        if self.merged:
            text += f" {len(self.merged)} layers, in which another node merges places of the picture, were left out."
        return text

    def why_empty(self) -> str:
        if not self.pictures:
            return (
                "No sampler has run with this model: connect the model that comes out of Record Nested Attention to "
                "the sampler."
            )
        if not self.subjects:
            return (
                "The prompt holds no subject, or its strength is 0, or its start_percent is not below its end_percent: "
                "see Apply Subject."
            )
        if self.partial:
            return (
                "The sampler worked on parts of the picture (areas, tiles) or of the batch, which cannot be recorded."
            )
        if self.merged:
            return "Another node merges places of the picture, which cannot be recorded."
        named = f"No layer's name holds '{self.layers}', or no" if self.layers else "No"
        return f"{named} subject was active at the steps '{self.steps}' of {self.total}."

    def require_run(self, prompt: Prompt | None, source: Any) -> None:
        """Raise ValueError where there is nothing to show, or not of the run that made the picture.

        The host keeps results of earlier queues: it may hand out an old picture while the model has sampled another
        since. The prompt tells them apart.

        source   the link [node id, output] that the picture comes from, or None
        """
        if not self.record.maps:
            raise ValueError(f"The record is empty. {self.why_empty()} {AGAIN}")
        if not self.complete:
            raise ValueError(f"The recorded run was interrupted. {AGAIN}")
        if not prompt or self.sampler not in prompt:
            return
        if isinstance(source, list) and self.sampler not in upstream(prompt, source[0]):
            raise ValueError(
                f"The record is of the sampler in node {self.sampler}, the picture comes from elsewhere. Give the "
                "sampler that makes the picture a Record Nested Attention of its own."
            )
        graph = json.dumps({i: prompt[i]["inputs"] for i in upstream(prompt, self.sampler)}, sort_keys=True)
        if self.graph not in (None, graph):
            raise ValueError(f"The record is of another run (seed {self.seed}) than the picture. {AGAIN}")
        self.graph = graph


AGAIN = (
    "If the picture came out of ComfyUI's cache, change a value of Record Nested Attention, such as limit_mb, and "
    "queue again: that samples it anew."
)


def upstream(prompt: Prompt, node: str) -> set[str]:
    """Ids of a node and of all that it depends on."""
    found, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node in prompt and node not in found:
            found.add(node)
            waiting += [value[0] for value in prompt[node]["inputs"].values() if is_link(value)]
    return found


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def step_of(options: dict[str, Any]) -> tuple[int, int]:
    """Which step of how many a call belongs to; calls between two steps go to the nearer one."""
    sigmas = options.get("sample_sigmas")
    if sigmas is None or len(sigmas) < 2:
        return 1, 1
    distance = (sigmas[:-1].float().cpu() - options["sigmas"].max().float().cpu()).abs()
    return int(distance.argmin()) + 1, len(sigmas) - 1


@dataclass(frozen=True)
class Call:
    """One call of the UNet that is recorded, at a step."""

    recording: Recording
    step: int

    def layer(
        self, index: int, rows: Rows, qkv: list[Tensor], tokens: list[NestedToken], options: dict[str, Any]
    ) -> Callable[[Tensor], None] | None:
        """Listener for a layer's p_s [B, H, N, S] in rows that hold subjects; q, k, v are theirs, [B, H, N or T, D]."""
        recording, (h, w) = self.recording, options["activations_shape"][2:4]
        label = "{} {}.{} ".format(*recording.sites[index].key) + f"{h}x{w}"
        # Each entry of the conditioning fills as many rows as there are pictures.
        mine = [r - rows.start for r in range(rows.start, rows.stop) if r % recording.pictures == recording.shown]
        if not mine or not is_wanted(label, recording.layers):
            return None
        if qkv[0].shape[2] != h * w:
            recording.merged.add(index)
            return None

        def observe(p: Tensor) -> None:
            record = recording.record
            record.labels[index] = label
            for row in mine:
                for subject, mass in masses(rows, tokens, p[row]):
                    record.add_map(self.step, index, subject, mass.reshape(h, w))
            q, _, v = (merge_heads(x[mine[0], None])[0] for x in qkv)
            textual = {use.subject: v[use.columns[0]] for use in rows.uses}
            record.add_queries(index, (h, w), q, qkv[0].shape[1], textual)

        return observe


def masses(rows: Rows, tokens: list[NestedToken], p: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each subject's attention [N], the mean over heads of [H, N, S], summed over the subject's columns."""
    parts = p.mean(0).split([len(token.columns) for token in tokens], dim=-1)
    for subject in dict.fromkeys(use.subject for use in rows.uses):
        yield subject, sum(part.sum(-1) for use, part in zip(rows.uses, parts, strict=True) if use.subject == subject)
