"""Make, combine, save and load subjects."""

from __future__ import annotations

from dataclasses import replace

import folder_paths
from comfy_api.latest import io, ui

from ..nested_attention.crop import FITS
from ..nested_attention.host.adapters import bind, load_adapter, subject_of
from ..nested_attention.host.images import check_mask, encode
from ..nested_attention.host.notice import show
from ..nested_attention.subject import combine, load_subject, save_subject
from .folders import ADAPTERS, SUBJECTS, choices, full_path, modified, new_file
from .sockets import CATEGORY, Adapter, Subject


class EncodeSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionEncodeSubject",
            display_name="Encode Subject",
            category=CATEGORY,
            description="Turns one or more photos of a subject into nested tokens. A batch is several photos of one "
            "subject. For faces, crop tightly around the head.",
            inputs=[
                Adapter.Input("adapter", tooltip="From Load Nested Adapter."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder that the adapter was trained with, usually CLIP ViT-H/14."
                ),
                io.Image.Input("image", tooltip="Photo of the subject; a batch is several photos of the same one."),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    tooltip="How a picture is made square. center crop: its middle (usual); pad: all "
                    "of it on grey; squash: all of it, distorted.",
                ),
                io.Combo.Input(
                    "images",
                    options=["concatenate", "average"],
                    tooltip="Several photos: concatenate keeps the tokens of each (usual; costs a little time per "
                    "photo), average takes their mean.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="The subject's area; all else is made grey."),
            ],
            outputs=[
                Subject.Output(display_name="subject"),
                io.Image.Output(display_name="seen", tooltip="What the image encoder saw."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, adapter, clip_vision, image, fit: str, images: str, mask=None) -> io.NodeOutput:
        check_mask(mask, image, cls.hidden.unique_id)
        seen, features = encode(clip_vision, image, mask, fit, adapter.config)
        return io.NodeOutput(subject_of(adapter, features, images), seen)


class CombineSubjects(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionCombineSubjects",
            display_name="Combine Subjects",
            category=CATEGORY,
            description="Makes one subject of two: more photos of the same one, or a blend of two identities. For two "
            "subjects in one picture, chain two Apply Subject nodes instead.",
            inputs=[
                Subject.Input("subject_a", tooltip="The first subject; with blend, the one at weight 0."),
                Subject.Input("subject_b", tooltip="The second subject, made by the same adapter."),
                io.Combo.Input(
                    "mode",
                    options=["concatenate", "blend"],
                    tooltip="concatenate: each place of the picture picks from both; blend: their mean, by weight.",
                ),
                io.Float.Input(
                    "weight",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="For blend: 0 is subject_a, 1 is subject_b. concatenate uses both whole.",
                ),
            ],
            outputs=[Subject.Output(display_name="subject")],
        )

    @classmethod
    def execute(cls, subject_a, subject_b, mode: str, weight: float) -> io.NodeOutput:
        return io.NodeOutput(replace(subject_a, subject=combine(subject_a.subject, subject_b.subject, mode, weight)))


class SaveSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionSaveSubject",
            display_name="Save Subject",
            category=CATEGORY,
            description="Saves a subject to models/nested_attention_subjects, to be used without its photos.",
            inputs=[
                Subject.Input("subject", tooltip="The subject to save, from Encode Subject or Combine Subjects."),
                io.String.Input(
                    "filename_prefix",
                    default="subject",
                    tooltip="Name of the file; a number is added, nothing is ever overwritten. A / makes subfolders.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, subject, filename_prefix: str) -> io.NodeOutput:
        path, shown = new_file(SUBJECTS, filename_prefix)
        save_subject(subject.subject, path)
        show(report := f"Saved as {shown}", cls.hidden.unique_id)
        return io.NodeOutput(ui=ui.PreviewText(report))


class LoadSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionLoadSubject",
            display_name="Load Subject",
            category=CATEGORY,
            description="Loads a saved subject, with the adapter that made it.",
            inputs=[
                io.Combo.Input(
                    "subject_name",
                    options=choices(SUBJECTS),
                    tooltip="A subject saved by Save Subject, from models/nested_attention_subjects.",
                ),
                Adapter.Input(
                    "adapter",
                    optional=True,
                    tooltip="The adapter that made the subject, if it is loaded already. Without it, the adapter file "
                    "that the subject names is loaded.",
                ),
            ],
            outputs=[Subject.Output(display_name="subject")],
        )

    @classmethod
    def fingerprint_inputs(cls, subject_name: str | None, **_: object) -> str:
        path = folder_paths.get_full_path(SUBJECTS, subject_name) if subject_name else None
        maker = load_subject(path).adapter_name if path else None
        return f"{modified(SUBJECTS, subject_name)} {modified(ADAPTERS, maker)}"

    @classmethod
    def execute(cls, subject_name: str, adapter=None) -> io.NodeOutput:
        subject = load_subject(full_path(SUBJECTS, subject_name))
        if adapter is None:
            if folder_paths.get_full_path(ADAPTERS, subject.adapter_name) is None:
                raise ValueError(
                    f"The adapter that made this subject, '{subject.adapter_name}', is not in models/{ADAPTERS}. Put "
                    "it there, or, if it has another name now, load it with Load Nested Adapter and connect it here."
                )
            adapter = load_adapter(full_path(ADAPTERS, subject.adapter_name), subject.adapter_name)
        return io.NodeOutput(bind(subject, adapter))


NODES = [EncodeSubject, CombineSubjects, SaveSubject, LoadSubject]
