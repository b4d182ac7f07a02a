"""The settings of a training, from a TOML or JSON file and from the command line."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..adapter import FeatureLayer
from ..attention import Norm
from ..crop import Fit

Cached = Literal["off", "memory", "disk"]
CACHES: tuple[Cached, ...] = typing.get_args(Cached)
PATHS = ("data", "output", "checkpoint", "diffusion_model", "text_encoders", "vae", "clip_vision", "start_from")
EVERY = ("log_every", "checkpoint_every", "validate_every")
FREE = ("output", "steps", "cache", "prefetch", "on_error", "validation_prompts", *EVERY)  # leave it the same training


class TrainingError(RuntimeError):
    """Why a training cannot begin or go on, in words for the user."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """
    data               folder of pictures with .txt captions beside them, a .jsonl file, or .tar shards (one, a folder
                       of them, or shards-{000..010}.tar)
    output             folder for the adapter, checkpoints, and the loss
    checkpoint, diffusion_model, text_encoders, vae, clip_vision   files of the base model: a whole checkpoint or parts
    start_from         an adapter to train further, instead of a fresh one

    class_word         word of the captions that the subject takes the place of; the placeholder is <class_word>
    queries            nested tokens of one photo; the paper has 1024
    dim, depth, dim_head, ff_mult   the Q-Former: its width, its layers, and in them the width of a head and how many
                       times wider than itself the feed-forward is
    feature_layer      of the image encoder whose features it sees
    norm, norm_factor  of the values: rescale gives them norm_factor times the norm of the text's, clamp at most that
    value_share        W_Vn of a fresh adapter is larger, and learns faster, in each head whose attention to the
                       subject's word, p_s, is below this on average: by share / p_s, at most a hundredfold. 0: as the
                       layer's own to_v

    resolution         the pictures' side, or that of a square of equal area with `buckets` (aspect ratios kept)
    fit, augment       how the subject's crop is made square, as in Encode Subject; strength of its augmentation
    caption_dropout    how often a caption is the placeholder alone
    subject_dropout    how often the image features are zero, so that the adapter also learns nobody in particular

    steps              of the optimizer (AdamW) in all, those before an interruption included
    batch              pictures of one forward pass of one process; a step has `accumulation` of them
    learning_rate      after the `warmup`, in whose steps it rises from 0
    qformer_rate       factor on the learning rate for the Q-Former: one that has learned already is soon spoilt
    schedule           of the learning rate after the warm-up: constant, or falling along a cosine to 0 at the last step
    weight_decay       of AdamW
    clip_norm          the largest norm of a step's gradients; 0: any
    ema                how much of it the running mean of the weights, which is what is saved, keeps at a step
    min_snr_gamma      0: the plain loss in the base model's own target
    precision          of the frozen base model, and of autocast in the adapter, whose weights stay fp32
    gradient_checkpointing   compute parts of the UNet twice in place of keeping them
    seed               of the fresh adapter, and of all that is drawn by chance

    cache              keep latents and text states in memory, or on disk in the output's folder `cache`
    prefetch           micro-batches read ahead
    holdout            entries that are only validated on
    validation_prompts written like captions; drawn with the subject of the first entry held out, or of the first of all
    log_every .. validate_every   steps between two of them
    on_error           stop or skip, for broken entries and failed writes; what is skipped is named and counted
    """

    data: str
    output: str
    checkpoint: str = ""
    diffusion_model: str = ""
    text_encoders: tuple[str, ...] = ()
    vae: str = ""
    clip_vision: str = ""
    start_from: str = ""

    class_word: str = "person"
    queries: int = 1024
    dim: int = 1280
    depth: int = 4
    dim_head: int = 64
    ff_mult: int = 4
    feature_layer: FeatureLayer = "last"
    norm: Norm = "rescale"
    norm_factor: float = 2.0
    value_share: float = 0.0

    resolution: int = 1024
    buckets: bool = True
    fit: Fit = "center crop"
    augment: float = 1.0
    caption_dropout: float = 0.05
    subject_dropout: float = 0.05

    steps: int = 10000
    batch: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    qformer_rate: float = 1.0
    weight_decay: float = 0.01
    warmup: int = 500
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float = 1.0
    ema: float = 0.999
    min_snr_gamma: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = True
    seed: int = 0

    cache: Cached = "off"
    prefetch: int = 2
    holdout: int = 0
    validation_prompts: tuple[str, ...] = ()
    log_every: int = 10
    checkpoint_every: int = 500
    validate_every: int = 500
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if isinstance(self.cache, bool):  # what it was in earlier settings
            object.__setattr__(self, "cache", "memory" if self.cache else "off")
        for name, hint in typing.get_type_hints(type(self)).items():
            check_type(name, getattr(self, name), hint)
        whole = ("queries", "dim", "depth", "dim_head", "ff_mult", "resolution", "steps", "batch", "accumulation")
        if self.resolution < 16:
            raise TrainingError(f"resolution is {self.resolution}, expected at least 16.")
        for name in (*whole, *EVERY):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, expected at least 1.")
        for name in ("augment", "warmup", "clip_norm", "min_snr_gamma", "prefetch", "holdout", "seed", "qformer_rate"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} is {getattr(self, name)}, expected 0 or more.")
        for name in ("caption_dropout", "subject_dropout", "ema", "value_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, expected 0 to 1.")
        if self.value_share and (self.norm == "rescale" or self.start_from):
            why = "start_from keeps the adapter's own" if self.start_from else "norm = rescale sets their size"
            raise TrainingError(f"value_share is for the first values of a fresh adapter, but {why}. Leave it at 0.")

        for prompt in self.validation_prompts:
            try:
                self.subject_caption(prompt)
            except ValueError as error:
                raise TrainingError(f"validation_prompts (of the node: preview_prompt): {error}.") from error

    @property
    def placeholder(self) -> str:
        return f"<{self.class_word}>"

    def subject_caption(self, caption: str) -> str:
        """The caption with the placeholder, which takes the place of the class word where it is not there already.

        Raises ValueError where neither of them is there.
        """
        caption, word = " ".join(caption.split()), self.class_word
        if self.placeholder in caption:
            return caption
        for pattern in (rf"<{re.escape(word)}>", rf"\b{re.escape(word)}\b"):
            if re.search(pattern, caption, re.IGNORECASE):
                return re.sub(pattern, lambda _: self.placeholder, caption, count=1, flags=re.IGNORECASE)
        raise ValueError(f"the caption '{caption}' holds neither {self.placeholder} nor the word {word}")

    def record(self) -> dict[str, Any]:
        """The settings as an adapter file tells them: files by name, without the folders of this machine."""
        settings = asdict(self)
        for name in PATHS:
            value = settings[name]
            settings[name] = [Path(v).name for v in value] if isinstance(value, tuple) else Path(value).name
        return json.loads(json.dumps(settings))


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raises TrainingError where a file of settings gives, say, a text in place of a number or of a list."""
    if typing.get_origin(hint) is tuple:
        right, expected = isinstance(value, tuple) and all(isinstance(part, str) for part in value), "a list of texts"
    elif typing.get_origin(hint) is Literal:
        right, expected = value in typing.get_args(hint), f"one of {', '.join(typing.get_args(hint))}"
    elif hint in (int, float):
        right = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
        right = right and abs(value) < 2**63  # nor infinite, nor NaN
        expected = "a number" if hint is float else "a whole number"
    else:
        kind = bool if hint is bool else str
        right, expected = isinstance(value, kind), "true or false" if kind is bool else "a text"
    if not right:
        raise TrainingError(f"{name} is {value!r}, expected {expected}.")


def changed(before: dict[str, Any], now: TrainingConfig) -> list[str]:
    """'batch: 4, was 2' for each setting that makes a resumed training another one."""
    before = {**{f.name: f.default for f in fields(now)}, **before}  # a setting that is newer was its default
    free = set(FREE) - ({"steps"} if now.schedule == "cosine" else set())  # the rates of all steps follow from the last
    return [f"{k}: {v}, was {before[k]}" for k, v in now.record().items() if k not in free and before[k] != v]


def from_arguments(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """Settings from `--config FILE` and options, which come before the file's.

    Raises TrainingError where a setting is unknown, missing or out of its range.
    """
    given = vars(argument_parser().parse_args(arguments))
    file = given.pop("config", None)
    values = {**(read_file(Path(file)) if file else {}), **given}
    known = {f.name for f in fields(TrainingConfig)}
    if unknown := sorted(values.keys() - known):
        raise TrainingError(f"Unknown settings: {', '.join(unknown)}. Known are: {', '.join(sorted(known))}.")
    if missing := [name for name in ("data", "output") if name not in values]:
        raise TrainingError(f"These settings are missing: {', '.join(missing)}.")
    return TrainingConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nested_attention.training",
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=inspect.cleandoc(TrainingConfig.__doc__ or ""),
    )
    parser.add_argument("--config", help="TOML or JSON file of the settings below; options come before it")
    hints = typing.get_type_hints(TrainingConfig)
    for setting in fields(TrainingConfig):
        option, hint = f"--{setting.name.replace('_', '-')}", hints[setting.name]
        told = {"help": "needed" if setting.default is MISSING else f"default: {setting.default}"}
        if setting.default in ("", ()):
            told = {}
        if setting.name == "cache":  # alone and as --no-cache it is the switch that it once was
            parser.add_argument(option, nargs="?", const="memory", choices=CACHES, **told)
            parser.add_argument("--no-cache", dest="cache", action="store_const", const="off", help=argparse.SUPPRESS)
        elif hint is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **told)
        elif typing.get_origin(hint) is tuple:
            parser.add_argument(option, nargs="*", **told)
        elif typing.get_origin(hint) is Literal:
            parser.add_argument(option, choices=typing.get_args(hint), **told)
        else:
            parser.add_argument(option, type=hint, **told)
    return parser


def read_file(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".toml":
            settings = json.loads(text)
            if not isinstance(settings, dict):
                raise ValueError("not an object of settings")
            return settings
        import tomllib  # from Python 3.11 on

        return tomllib.loads(text)
    except ModuleNotFoundError as error:
        raise TrainingError("TOML files need Python 3.11. Write the settings as JSON instead.") from error
    except (OSError, ValueError) as error:
        advice = " Write paths with /, or in TOML in single quotes: 'C:\\people'." if "\\" in text else ""
        advice += "" if path.suffix.lower() in (".toml", ".json") else " Expected a .toml or a .json file."
        raise TrainingError(f"The settings in {path} cannot be read: {error}.{advice}") from error
