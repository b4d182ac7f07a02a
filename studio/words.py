"""The words of the small model: the tokens that captions hold, out of CLIP's vocabulary."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import comfy.sd1_clip
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from .scenes import Figure, World

LENGTH, START, END = 77, 49406, 49407
UNKNOWN = 0  # row of the embedding for every token that captions do not hold
UNKNOWN_CHANCE = 0.02  # how often a known token is replaced by it in training


class Words:
    """Captions to rows of the embedding: [START ... END END ...] in CLIP's own order, padded with END."""

    def __init__(self, world: World, captions: int = 6000):
        folder = Path(os.path.dirname(comfy.sd1_clip.__file__)) / "sd1_tokenizer"
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.pieces = cache(lambda word: self.tokenizer(word)["input_ids"][1:-1])
        rng = Random("words")
        texts = [world.words(rng) for _ in range(captions)]
        self.ids = sorted({token for text in texts for token in self.tokens(text)})
        self.rows = {token: row for row, token in enumerate(self.ids, 1)}

    def tokens(self, caption: str) -> list[int]:
        """CLIP's, [START ... END]. It knows no token of two words, so that each word is looked up once."""
        return [START, *(token for word in caption.split() for token in self.pieces(word)), END]

    def __call__(self, caption: str, rng: Random | None = None) -> list[int]:
        tokens = [self.rows.get(token, UNKNOWN) for token in self.tokens(caption)]
        if rng:
            tokens = [tokens[0], *(UNKNOWN if rng.random() < UNKNOWN_CHANCE else t for t in tokens[1:-1]), tokens[-1]]
        if len(tokens) > LENGTH:
            raise ValueError(f"'{caption}' has {len(tokens)} tokens, more than {LENGTH}.")
        return tokens

    def batch(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Rows [B, 77] and where their text is [B, 77, 1]; the first END belongs to it, as in the host."""
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.tensor([row + [self.rows[END]] * (LENGTH - len(row)) for row in rows])
        return padded, (torch.arange(LENGTH) < lengths[:, None]).unsqueeze(-1).float()


def noun_columns(caption: str, figures: Sequence[Figure], world: World, words: Words) -> list[int]:
    """Where the noun of each figure stands among the tokens of the caption that tells of them."""
    tokens = words.tokens(caption)
    columns: list[int] = []
    for figure in figures:
        names = ["person"] if figure.kind == "people" else ["pet", world.attributes(figure)[0]["kind"]]
        ends = [words.pieces(name)[-1] for name in names]
        columns.append(next(i for end in ends for i, t in enumerate(tokens) if t == end and i not in columns))
    return columns
