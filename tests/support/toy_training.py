"""A training of a few milliseconds a step, without ComfyUI: one attention layer's change, learnt from random features.

Run as a program it trains in the folder given first, perhaps as one of several processes, with a pause at each step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from nested_attention.adapter import AdapterConfig, NestedAdapter
from nested_attention.attention import NestedToken, personalize, split_heads, text_attention
from nested_attention.training.config import TrainingConfig
from nested_attention.training.entries import Entry
from nested_attention.training.processes import joined, rank_and_size
from nested_attention.training.samples import Plan, Sample
from nested_attention.training.trainer import Trainer
from nested_attention.training.troubles import Troubles

SHAPE = {"image_dim": 8, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "queries": 4, "output_dim": 8}


def settings(folder: Path, **changes) -> TrainingConfig:
    return TrainingConfig(
        **{"data": "toy", "output": str(folder), "steps": 12, "batch": 2, "resolution": 64, "warmup": 3}
        | {"precision": "fp32", "checkpoint_every": 3, "log_every": 100, "learning_rate": 1e-2}
        | changes
    )


class ToyReader:
    """Rows to samples whose features and targets come from the entry's number. Each process finds another broken."""

    def __init__(self, config: TrainingConfig, count: int = 5):
        self.entries = [Entry(Path(f"{i}.png"), "<person>", (64, 64 + 32 * (i % 2))) for i in range(count)]
        rank, processes = rank_and_size()
        self.plan, self.broken = Plan(self.entries, config, processes), {rank}

    fingerprint = "toy"

    def __call__(self, row) -> Sample:
        picture = torch.randn(1, 6, 16, generator=row.generator("noise"), dtype=torch.float64)
        crop = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(row.entry), dtype=torch.float64)
        return Sample(row, picture, crop, "<person>", self.entries[row.entry].size)


def objective(project, samples):
    q = torch.cat([s.picture for s in samples]).double()
    features = torch.cat([s.crop for s in samples])
    total = 0
    for keys, values in project(features):
        qh, kh, vh = (split_heads(x, 2) for x in (q, q.flip(1), q * 0.5))
        text, lse = text_attention(qh, kh, vh)
        token = NestedToken((1,), split_heads(keys, 2), split_heads(values, 2))
        out = personalize(text.clone(), qh, kh, vh, [token], text, lse)
        total = total + (out - features.mean((1, 2)).view(-1, 1, 1, 1)).square().mean()
    return total


def make_trainer(config: TrainingConfig, kind: type[Trainer] = Trainer, **changes) -> Trainer:
    torch.manual_seed(0)
    adapter = NestedAdapter(AdapterConfig(**SHAPE, layers=(16, 16))).double()
    return kind(config, adapter, objective, ToyReader(config), Troubles(config.on_error), **changes)


class Recording(Trainer):
    """Keeps the gradients of its first step."""

    def update(self) -> None:
        if self.step == 0:
            gradients = {name: p.grad.clone() for name, p in self.adapter.named_parameters()}
            torch.save(gradients, f"{self.config.output}/gradients-{self.rank}.pt")
        super().update()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined():
        config = settings(
            Path(sys.argv[1]), steps=int(sys.argv[2]), batch=int(sys.argv[3]), accumulation=int(sys.argv[4])
        )
        make_trainer(config, Recording).run(stop=lambda: time.sleep(float(sys.argv[5])) is not None)
    threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]  # on Linux
    assert not any("gloo" in name for name in threads), threads
