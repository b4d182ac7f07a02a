"""Trains the text encoder apart first, to name what a caption tells, as CLIP's is trained apart by pictures.

Beside a UNet that cannot draw yet a fresh one would forget its words, since all prompts do the same for that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import comfy.ops
import torch
import torch.nn.functional as F
from comfy.clip_model import CLIPTextModel
from torch import Tensor, nn

from nested_attention.host.studio import TEXT

from .attributes import Heads
from .loop import Batch, Plan, differentiable, half, initialize, share, train
from .scenes import MOST, STANDS, Figure, World
from .words import LENGTH, Words, noun_columns

BATCH = 64
TOLD = (0.1, 0.9, 0.9, 0.9)  # how often a caption tells each attribute of somebody; one is drawn for each caption


class TextEncoder(nn.Module):
    """CLIP's text model with the embedding of the known words alone, and heads that are thrown away after training.

    A noun's state is to say who somebody is, as far as the words before it tell, and not how they look in this picture:
    a subject will take its place. The state at a text's end says all of them where they are alone, and the place.
    """

    def __init__(self, words: int):
        super().__init__()
        plain = comfy.ops.disable_weight_init
        self.model = CLIPTextModel(TEXT, torch.float32, "cpu", plain)
        self.model.set_input_embeddings(plain.Embedding(words + 1, TEXT["hidden_size"]))
        self.heads = Heads(TEXT["hidden_size"])
        initialize(self)
        differentiable(self)
        embeddings = self.model.text_model.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=0.2)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """States of texts, [B, 77, C]. Past a text's end they are zero and need not be computed: each sees its past. On
        a GPU they are, where that costs less than to ask for the length.
        """
        length = LENGTH if text.is_cuda else int(text.sum(1).max())
        model = self.model.text_model
        states = model.embeddings.token_embedding(tokens[:, :length], out_dtype=torch.float32)
        states = states + model.embeddings.position_embedding.weight[:length]
        causal = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)
        states = model.final_layer_norm(model.encoder(states, mask=causal)[0]) * text[:, :length]
        return F.pad(states, (0, 0, 0, LENGTH - length))

    def telling(self, states: Tensor, told: Tensor) -> Tensor:
        """The error of what states [B, 77, C] say of what captions tell; `told` is as `tellings` has it."""
        rows, columns, targets = told[:, 0], told[:, 1], told[:, 2:]
        return self.heads.loss(states[rows, columns].float(), targets)


def tellings(heads: Heads, world: World, words: Words, texts: Sequence[tuple[str, str, tuple[Figure, ...]]]) -> Tensor:
    """Where the states of texts tell something, and what: [tellings, row, column, targets of the heads].

    Always as many as of texts with MOST figures each: what is missing tells nothing.

    texts   caption, place, and who is in it; empty captions tell nothing
    """
    places, truths = [], []
    for row, (caption, place, figures) in enumerate(texts):
        if not caption:
            continue
        end = len(words(caption)) - 1
        places += [(row, column) for column in (*noun_columns(caption, figures, world, words), end)]
        truths += [{figure.kind: world.attributes(figure)[0]} for figure in figures]
        alone = {figures[0].kind: world.known(figures[0])} if len(figures) == 1 else {}
        truths.append(alone | {"scene": {"place": place}})
    missing = (MOST + 1) * len(texts) - len(places)
    places, truths = places + [(0, 0)] * missing, truths + [{}] * missing
    return torch.cat((torch.tensor(places), heads.targets(truths)), dim=1)


def train_text(world: World, words: Words, work: Path, steps: int, size: int = BATCH) -> TextEncoder:
    torch.manual_seed(0)
    encoder = TextEncoder(len(words.ids))

    def batch(number: int) -> Batch:
        rng, texts = Random(f"text {number}"), []
        for _ in range(share(size)):
            figures, place = world.figures(rng.choice(list(STANDS)), rng), world.place(rng)
            texts.append((world.caption(figures, place, rng, rng.choice(TOLD)), place, figures))
        tokens, text = words.batch([words(caption, rng) for caption, _, _ in texts])
        return {"tokens": tokens, "text": text, "told": tellings(encoder.heads, world, words, texts)}

    def losses(batch: Batch) -> dict[str, Tensor]:
        with half(batch["tokens"].device):
            states = encoder(batch["tokens"], batch["text"])
        return {"loss": encoder.telling(states, batch["told"])}

    return train(encoder, batch, losses, Plan(steps, size), work / "text")
