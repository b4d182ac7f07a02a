"""A prompt as the text encoders read it, in words: tokens, their columns, which are subjects, what is cut off."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .connected import require
from .text import agreed_places, encoder_names, encoder_widths, marked, placeholder_of, spelled


def describe_prompt(clip: Any, text: str) -> str:
    """One line a token section of each encoder.

    Raises ValueError where an encoder is no CLIP, or where they disagree on a subject's column.
    """
    require(clip=clip)
    encoder_names(clip.tokenizer)
    tokens = clip.tokenize(text)
    widths = encoder_widths(clip, tokens)
    tokens = {name: tokens[name] for name in widths}
    kept = min(len(sections) for sections in tokens.values())
    lines = []
    for name, sections in tokens.items():
        encoder = getattr(clip.tokenizer, f"clip_{name}")
        for i, section in enumerate(sections):
            cut = " (cut off: the other encoder's text is shorter)" if i >= kept else ""
            words = " ".join(described(entry, column, encoder) for column, entry in words_of(section, encoder))
            lines.append(f"CLIP-{name.upper()} section {i + 1}{cut}: {words or 'empty'}")
    places = agreed_places({name: marked(sections, widths[name]) for name, sections in tokens.items()})
    found = [f"{p} at column {c} of section {i + 1}, strength {w:g}" for (i, c, p), w in sorted(places.items())]
    return "\n".join([*lines, "Subjects: " + ("; ".join(found) or "none")])


def words_of(section: list[tuple], encoder: Any) -> list[tuple[int, tuple]]:
    """Columns and entries between the start and the first end token."""
    ends = [i for i, (token, *_) in enumerate(section) if not isinstance(token, Tensor) and token == encoder.end_token]
    return [*enumerate(section)][1 : ends[0] if ends else None]


def described(entry: tuple, column: int, encoder: Any) -> str:
    """'2:cat', '3:<person>(as person)', '4:[embedding]', with a weight other than 1 behind it."""
    token, weight, *_ = entry
    word = "[embedding]" if isinstance(token, Tensor) else spelled(encoder, token)
    if placeholder := placeholder_of(token):
        word = f"{placeholder}(as {'a learned word' if isinstance(token, Tensor) else word})"
    return f"{column}:{word}" + (f"*{weight:g}" if weight != 1 else "")
