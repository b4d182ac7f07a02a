"""Train an adapter on the canvas."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..nested_attention.adapter import FEATURE_LAYERS
from ..nested_attention.attention import NORMS
from ..nested_attention.host.base import Base
from ..nested_attention.host.graph_training import store_pictures, train_in_graph, trained
from ..nested_attention.training.config import CACHES, TrainingConfig
from .folders import RUNS, check_file_name
from .sockets import CATEGORY, Adapter


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionTrain",
            display_name="Train Nested Adapter",
            category=CATEGORY,
            description="Trains an adapter on captioned pictures: it teaches the base model to read one kind of "
            "subject from a photo. Cancel keeps what was learnt; queued again, the training goes on.",
            search_aliases=["nested attention", "train adapter", "fine-tune", "personalization"],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the adapter is for. It stays as it is."),
                io.Clip.Input("clip", tooltip="The base model's text encoders."),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder to read subjects with, usually CLIP ViT-H/14."
                ),
                io.String.Input(
                    "name",
                    default="person",
                    tooltip="The run's folder in output/nested_attention. Queued again under the same name, a training "
                    "goes on from its checkpoint; another name begins anew.",
                ),
                io.String.Input(
                    "class_word",
                    default="person",
                    tooltip="What the subjects are, in one word that CLIP knows as one token: person, dog, car. In "
                    "captions, it or <class_word> is where the subject stands.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One line per connected picture, or one line for all, each with the class word: 'a person "
                    "reading in a park'. Empty: 'a photo of a' and the class word.",
                ),
                io.String.Input(
                    "dataset",
                    default="",
                    tooltip="In place of connected pictures: a folder of pictures with .txt captions, a .jsonl file, "
                    "or .tar shards; a path, or one within ComfyUI's input folder.",
                ),
                io.Int.Input(
                    "steps",
                    default=2000,
                    min=1,
                    max=10_000_000,
                    tooltip="How many steps the training has in all, those before an interruption included: 2000 to "
                    "see whether it learns, 20000 and more for a good adapter.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="How far each step goes. 1e-4 is usual; less if the loss jumps.",
                ),
                io.Int.Input(
                    "tokens",
                    default=1024,
                    min=1,
                    max=4096,
                    tooltip="Nested tokens of one photo. 1024 is the paper's; 256 trains faster and needs less memory.",
                ),
                io.Int.Input(
                    "batch", default=1, min=1, max=1024, tooltip="Pictures in one step: as many as fit the GPU."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Decides all chance in the training. To train anew with another one, give another name.",
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Pictures are scaled to the area of a square of this side: 1024 for SDXL, 512 for SD 1.5.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures to train on; all of each is what is learnt to draw."
                ),
                io.Image.Input(
                    "crops",
                    optional=True,
                    tooltip="The subject of each picture, cropped tightly, for the image encoder. Without them it sees "
                    "the whole pictures.",
                ),
                Adapter.Input(
                    "adapter",
                    optional=True,
                    tooltip="An adapter to train further. Its own tokens, dim, depth, norm and feature_layer stay.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=250,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    tooltip="Draw a sample of the first subject every so many steps, and at the end. 0: never.",
                ),
                io.String.Input(
                    "preview_prompt",
                    default="",
                    optional=True,
                    tooltip="Prompt of the samples, with the class word. Empty: 'a photo of a' and the class word.",
                    advanced=True,
                ),
                *ADVANCED,
            ],
            outputs=[
                Adapter.Output(display_name="adapter"),
                io.Image.Output(display_name="loss_curve"),
                io.Image.Output(display_name="sample", tooltip="The last sample: the subject, and what was drawn."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        clip_vision,
        name: str,
        class_word: str,
        captions: str,
        dataset: str,
        tokens: int,
        images=None,
        crops=None,
        adapter=None,
        preview_every: int = 250,
        preview_prompt: str = "",
        **settings,
    ) -> io.NodeOutput:
        folder, word = run_folder(name), class_word.strip()
        dataset = dataset.strip().strip('"')  # in which Windows copies paths
        if (images is None) == (not dataset):
            raise ValueError("Connect pictures to images, or name a dataset: one of the two, not both.")
        if crops is not None and (images is None or len(crops) != len(images)):
            raise ValueError("Connect one of crops for each of images, in their order. A dataset has its own.")
        if images is None:
            data = Path(folder_paths.get_input_directory()) / dataset
        else:
            data = store_pictures(folder, images, lines_for(images, captions, word), crops)
        if preview_every:
            prompt = preview_prompt.strip() or f"a photo of a {word}"
            settings |= {"validation_prompts": (prompt,), "validate_every": preview_every}
        config = TrainingConfig(
            data=str(data),
            output=str(folder),
            start_from=adapter.name if adapter else "",
            class_word=word,
            queries=tokens,
            **{"warmup": 100, **settings},
        )
        base = Base(model, clip, vae, clip_vision)
        done = train_in_graph(config, base, start=adapter, node_id=cls.hidden.unique_id)
        report = f"{done} steps, {config.steps} in all. The run is in output/{RUNS}/{folder.name}."
        if not done:
            report = f"The run {folder.name} had all its steps. Raise steps to go on; another name begins anew."
        return io.NodeOutput(*trained(folder), ui=ui.PreviewText(report))


ADVANCED = [
    io.Int.Input(
        "accumulation",
        default=1,
        min=1,
        max=1024,
        optional=True,
        advanced=True,
        tooltip="Forward passes in one step: 4 of batch 1 learn as one of batch 4, in less memory.",
    ),
    io.Int.Input(
        "warmup",
        default=100,
        min=0,
        max=1_000_000,
        optional=True,
        advanced=True,
        tooltip="Steps over which the learning rate rises from 0; 100 to 500 are usual.",
    ),
    io.Float.Input(
        "augment",
        default=1.0,
        min=0.0,
        max=3.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="How much the subject's crop is varied (flip, turn, shift, light, color). 1 is usual, 0: not at all.",
    ),
    io.Float.Input(
        "min_snr_gamma",
        default=0.0,
        min=0.0,
        max=20.0,
        step=0.5,
        optional=True,
        advanced=True,
        tooltip="Weights the loss by the signal to noise, up to this (min-SNR); 5 is usual. 0: the plain loss.",
    ),
    io.Int.Input(
        "dim",
        default=1280,
        min=64,
        max=8192,
        step=64,
        optional=True,
        advanced=True,
        tooltip="Width of the Q-Former, which reads the image encoder's features. 1280 for a real adapter.",
    ),
    io.Int.Input(
        "depth",
        default=4,
        min=1,
        max=32,
        optional=True,
        advanced=True,
        tooltip="How many layers the Q-Former has. 4 is usual.",
    ),
    io.Combo.Input(
        "norm",
        options=["rescale", *(norm for norm in NORMS if norm != "rescale")],
        optional=True,
        advanced=True,
        tooltip="How the size of the subject's values is kept near the text's, in training and in use. rescale: "
        "always; clamp: only where larger; off: not at all.",
    ),
    io.Combo.Input(
        "feature_layer",
        options=list(FEATURE_LAYERS),
        optional=True,
        advanced=True,
        tooltip="Which features of the image encoder the adapter reads. last is the paper's.",
    ),
    io.Boolean.Input(
        "gradient_checkpointing",
        default=True,
        optional=True,
        advanced=True,
        tooltip="Computes parts of the UNet twice in place of keeping them: less memory, about a third slower.",
    ),
    io.Combo.Input(
        "cache",
        options=list(CACHES),
        optional=True,
        advanced=True,
        tooltip="Keep latents and encoded captions once they are made: in memory, or on disk in the run's folder, "
        "where they stay for the next time. Faster from the second epoch on.",
    ),
    io.Int.Input(
        "holdout",
        default=0,
        min=0,
        max=100_000,
        optional=True,
        advanced=True,
        tooltip="Pictures that are kept apart, 8 or so: samples show the first of them, the loss curve their loss in "
        "red.",
    ),
    io.Combo.Input(
        "on_error",
        options=["stop", "skip"],
        optional=True,
        advanced=True,
        tooltip="A broken picture or caption, or a full disk: stop and name it, or name it in the log and go on.",
    ),
    io.Int.Input(
        "checkpoint_every",
        default=500,
        min=1,
        max=1_000_000,
        optional=True,
        advanced=True,
        tooltip="Steps between checkpoints. Cancel writes one too; these are for when the machine stops.",
    ),
]


def run_folder(name: str) -> Path:
    """Raises ValueError where the name leads out of the output folder, or is none on Windows."""
    check_file_name(name)
    root = os.path.join(folder_paths.get_output_directory(), RUNS)
    folder = os.path.abspath(os.path.join(root, name.strip()))
    if os.path.dirname(folder) != os.path.abspath(root):
        raise ValueError(f"'{name}' cannot be the name of a run: write one that can be a folder's, such as person.")
    return Path(folder)


def lines_for(images, captions: str, word: str) -> list[str]:
    """A caption for each picture. Raises ValueError where their number does not fit."""
    lines = [line for line in captions.splitlines() if line.strip()] or [f"a photo of a {word}"]
    if len(lines) not in (1, len(images)):
        raise ValueError(f"{len(lines)} captions for {len(images)} pictures: write one line for each, or one for all.")
    return lines * len(images) if len(lines) == 1 else lines


NODES = [Train]
