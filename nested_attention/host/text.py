"""Placeholders in prompts: a CLIP whose tokenizer knows them and whose encoder says where they stand.

Every text node of any pack that uses this CLIP understands the placeholder. It stands for one token, that of the class
word (or a learned vector); a prompt weight on it is the subject's strength and leaves the text as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import KEY
from .marks import Ledger, Mark, Section, digest, sign
from .notice import log

ENCODE = "encode_token_weights"
SENTINELS = ("zebra", "tulip", "piano", "canoe", "lemon", "otter", "comet", "cactus", "violin", "anchor", "pepper")

Tokens = dict[str, list[list[tuple]]]  # encoder name to sections of (token, weight, ...)


class SubjectToken(int):
    """A token id that remembers for which placeholder it stands; to everyone else the id."""

    nested_placeholder: str

    def __new__(cls, token: int, placeholder: str) -> SubjectToken:
        self = super().__new__(cls, token)
        self.nested_placeholder = placeholder
        return self

    def __getnewargs__(self) -> tuple[int, str]:
        """Of a copy."""
        return int(self), self.nested_placeholder


def subject_vector(vector: Tensor, placeholder: str) -> Tensor:
    """A learned embedding [C] in place of a token id, marked in the same way."""
    vector = vector.detach().clone()
    vector.nested_placeholder = placeholder
    return vector


@dataclass(eq=False)
class SubjectTokenizer:
    """The host's tokenizer, in which each placeholder is one token. `tokens`: placeholder to encoder to token."""

    base: Any
    tokens: Mapping[str, Mapping[str, SubjectToken | Tensor]]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.base, name)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Tokens:
        # A stand-in word is tokenised in the placeholder's place: '<person>' itself would be several tokens.
        used = [p for p in self.tokens if pattern(p).search(text)]
        stand_ins = dict(zip(used, unused_words(self.base, text, len(used)), strict=True))
        text = pattern(*used).sub(lambda found: f" {stand_ins[found[0]]} ", text) if used else text
        result = self.base.tokenize_with_weights(text, return_word_ids, **kwargs)
        for name, sections in result.items():
            swap = {word_ids(self.base, name, stand_ins[p])[0]: self.tokens[p][name] for p in used}
            result[name] = [[(swap_token(token, swap), *rest) for token, *rest in section] for section in sections]
        return result


def swap_token(token: Any, swap: dict[int, Any]) -> Any:
    return swap.get(token, token) if isinstance(token, int) else token


def pattern(*placeholders: str) -> re.Pattern[str]:
    """Matches any of the placeholders as a whole word: 'anna' is not in 'annabel'."""
    words = []
    for placeholder in sorted(placeholders, key=len, reverse=True):
        before = r"(?<!\w)" if re.match(r"\w", placeholder) else ""
        after = r"(?!\w)" if re.search(r"\w$", placeholder) else ""
        words.append(before + re.escape(placeholder) + after)
    return re.compile("|".join(words))


def encoder_names(tokenizer: Any) -> list[str]:
    """The host's names of the CLIP text encoders ("l", "g", "h"). Raises ValueError where there is another kind."""
    names = list(tokenizer.tokenize_with_weights(""))
    if odd := [name for name in names if not hasattr(getattr(tokenizer, f"clip_{name}", None), "tokenizer")]:
        raise ValueError(
            f"Nested Attention needs CLIP text encoders, as SD 1.5 and SDXL have; this one has {', '.join(odd)}."
        )
    return names


def word_ids(tokenizer: Any, name: str, word: str) -> list[int]:
    encoder = getattr(tokenizer, f"clip_{name}")
    ids = encoder.tokenizer(word)["input_ids"][encoder.tokens_start :]
    return ids[:-1] if encoder.tokenizer_adds_end_token else ids


def unused_words(tokenizer: Any, text: str, count: int) -> list[str]:
    """Words of one token in every encoder that the text does not hold."""
    names = list(tokenizer.tokenize_with_weights("")) if count else []
    free = (word for word in SENTINELS if word not in text.lower())
    words = [word for word in free if all(len(word_ids(tokenizer, name, word)) == 1 for name in names)][:count]
    if len(words) < count:
        raise ValueError(
            f"A prompt can hold {len(SENTINELS)} subjects, one less for each of these words in it: "
            f"{', '.join(SENTINELS)}. This one has {count} subjects."
        )
    return words


def class_tokens(
    tokenizer: Any, placeholder: str, word: str, learned: Mapping[str, Tensor]
) -> dict[str, SubjectToken | Tensor]:
    """The token of a placeholder in each encoder: a learned vector, or the class word's id.

    Raises ValueError where the class word is not one token.
    """
    tokens: dict[str, SubjectToken | Tensor] = {}
    for name in encoder_names(tokenizer):
        if name in learned:
            tokens[name] = subject_vector(learned[name], placeholder)
            continue
        ids = word_ids(tokenizer, name, word)
        if len(ids) != 1:
            parts = " + ".join(f"'{spelled(getattr(tokenizer, f'clip_{name}'), i)}'" for i in ids) or "nothing"
            raise ValueError(
                f"The class word must be one CLIP token; '{word}' is {len(ids)} ({parts}). "
                "Choose a simpler English word for what the subject is, such as person, woman, dog or car."
            )
        tokens[name] = SubjectToken(ids[0], placeholder)
    return tokens


def spelled(encoder: Any, token: int) -> str:
    """A token of one encoder's vocabulary as text, with \ufffd for a part of a letter."""
    return encoder.tokenizer.decode([int(token)]).strip()


@dataclass(frozen=True)
class SubjectTextEncoder:
    """The host's text encoding, which also says where subjects' tokens came to stand.

    encode   the host's own function: tokens to (states [1, T, C], pooled, ...)
    widths   embedding width of each encoder
    ledger   receives the sections that hold subjects
    """

    encode: Callable[[Tokens], tuple]
    widths: Mapping[str, int]
    ledger: Ledger

    def __call__(self, tokens: Tokens) -> tuple:
        places = agreed_places({name: marked(tokens[name], width) for name, width in self.widths.items()})
        plain = {name: [[unweighted(t) for t in section] for section in s] for name, s in tokens.items()}
        states, pooled, *extra = self.encode(plain)
        length = max(len(section) for s in tokens.values() for section in s)
        states = signed(states, places, length)
        sections = sections_of(states, places, length)
        self.ledger.add(sections)
        return states, pooled, {**(extra[0] if extra else {}), KEY: sections}


def placeholder_of(token: Any) -> str | None:
    return getattr(token, "nested_placeholder", None)


def unweighted(entry: tuple) -> tuple:
    return (entry[0], 1.0, *entry[2:]) if placeholder_of(entry[0]) else entry


Place = tuple[int, int, str]  # section, column, placeholder


def marked(sections: list[list[tuple]], width: int) -> dict[Place, float]:
    """Places of the subjects' tokens in one encoder, with their prompt weights.

    The host drops inserted embeddings of another width than the encoder's, which moves all that follows.
    """
    places = {}
    for i, section in enumerate(sections):
        column = 0
        for token, weight, *_ in section:
            if placeholder := placeholder_of(token):
                places[i, column, placeholder] = weight
            if not isinstance(token, Tensor):
                column += 1
            elif token.shape[-1] == width:
                column += token.numel() // width
    return places


def agreed_places(places: dict[str, dict[Place, float]]) -> dict[Place, float]:
    """One set of places for all encoders. Raises ValueError where they put a subject at different columns."""
    holding = {name: set(found) for name, found in places.items() if found}
    first = next(iter(holding.values()), set())
    if any(found != first for found in holding.values()):
        where = "; ".join(
            f"CLIP-{name.upper()}: " + ", ".join(f"{p} at {77 * i + c}" for i, c, p in sorted(found))
            for name, found in holding.items()
        )
        raise ValueError(
            f"The text encoders put the subject at different columns ({where}). Either the texts for CLIP-L and CLIP-G "
            "differ before it, or an embedding before it exists for only one encoder and the other drops it. Write the "
            "subject at the same place in both texts, before any such embedding."
        )
    if holding and len(holding) < len(places):
        log.info("Nested Attention: only the text for CLIP-%s holds the subject.", ", ".join(holding).upper())
    return {place: weight for found in places.values() for place, weight in found.items()}


def signed(states: Tensor, places: dict[Place, float], length: int) -> Tensor:
    """Encoded text [1, T, C] with signed subjects' tokens. Raises ValueError where it was cut before a subject."""
    states = states.clone() if places else states
    for (i, c, placeholder), weight in places.items():
        column = i * length + c
        if column >= states.shape[1]:
            raise ValueError(
                f"The subject {placeholder} stands at token {column} of the prompt, but the text encoders "
                f"kept only {states.shape[1]}. Put it nearer to the beginning, or make both texts equally long."
            )
        states[0, column] = sign(states[0, column], placeholder, weight)
    return states


def sections_of(states: Tensor, places: dict[Place, float], length: int) -> list[Section]:
    """Sections of encoded text [1, T, C] with their marks."""
    sections = []
    for i, part in enumerate(states[0].split(length)):
        marks = [Mark(p, c, weight, part[c].detach().cpu().clone()) for (s, c, p), weight in places.items() if s == i]
        sections.append(Section(digest(part), length, tuple(marks)))
    return sections


def add_placeholder(clip: Any, placeholder: str, class_word: str, learned: Mapping[str, Tensor]) -> tuple[Any, Ledger]:
    """A clone of the CLIP that knows one more placeholder, and the ledger that it writes.

    Raises ValueError for an unusable placeholder, class word or learned embedding.
    """
    known = clip.tokenizer if isinstance(clip.tokenizer, SubjectTokenizer) else SubjectTokenizer(clip.tokenizer, {})
    check_placeholder(placeholder, known)
    token = class_tokens(known.base, placeholder, class_word, learned)
    widths = encoder_widths(clip, token)
    check_learned(learned, widths)
    result = clip.clone()
    result.cond_stage_model = result.patcher.model  # which a node that chose a device has put in place of it
    result.tokenizer = SubjectTokenizer(known.base, {**known.tokens, placeholder: token})
    encode = clip.patcher.get_model_object(ENCODE)
    encode = encode.encode if isinstance(encode, SubjectTextEncoder) else encode
    ledger = Ledger()
    result.patcher.add_object_patch(ENCODE, SubjectTextEncoder(encode, widths, ledger))
    return result, ledger


def check_placeholder(placeholder: str, known: SubjectTokenizer) -> None:
    if not placeholder or re.search(r"[\s()\\:,]", placeholder):
        raise ValueError(
            f"'{placeholder}' cannot be a placeholder: write one word without spaces, commas, colons, parentheses or "
            "backslashes, such as <person>."
        )
    if placeholder in known.tokens:
        raise ValueError(
            f"The placeholder {placeholder} is already taken by another subject. Give each subject its own, such as "
            "<anna> and <bob>."
        )


def check_learned(learned: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    for name, width in widths.items():
        if name in learned and len(learned[name]) != width:
            raise ValueError(
                f"The adapter's learned embedding for CLIP-{name.upper()} has {len(learned[name])} values, this text "
                f"encoder takes {width}. Load the CLIP of the adapter's base model, or write a class_word in its place."
            )


def encoder_widths(clip: Any, names: Mapping[str, Any]) -> dict[str, int]:
    """Of those that there are: SDXL's refiner has the tokenizer of two, and one of them."""
    encoders = {name: getattr(clip.cond_stage_model, f"clip_{name}", None) for name in names}
    return {n: e.transformer.get_input_embeddings().weight.shape[1] for n, e in encoders.items() if e is not None}
