"""Put a subject into model and CLIP."""

from __future__ import annotations

from comfy_api.latest import io

from ..nested_attention.host.apply import apply_subject
from .sockets import CATEGORY, Subject


class ApplySubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionApplySubject",
            display_name="Apply Subject",
            category=CATEGORY,
            description="Makes a word of the prompt stand for a subject. Encode prompts with the CLIP that comes out. "
            "Chain one node per subject.",
            search_aliases=["nested attention", "ip-adapter", "face swap", "identity"],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the adapter was made for."),
                io.Clip.Input(
                    "clip", tooltip="Its text encoders. Prompts that hold the placeholder use the CLIP output."
                ),
                Subject.Input("subject", tooltip="From Encode Subject or Load Subject."),
                io.String.Input(
                    "placeholder",
                    default="<person>",
                    tooltip="The word that stands for the subject in prompts: 'a <person> holding a plate of pasta'. "
                    "Any word without spaces; each subject needs its own. (<person>:1.3) means 1.3 times the strength.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip="What the subject is, in one word that CLIP knows as one token: person, woman, dog. It "
                    "decides where in the picture the subject goes. Empty: the adapter's own.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How much of the subject's appearance is used. 1 is usual, 0 is the plain class word.",
                ),
                io.Float.Input(
                    "token_weight",
                    default=1.0,
                    min=1.0,
                    max=10.0,
                    step=0.05,
                    tooltip="More makes more of the picture attend to the subject, and less to the rest of the prompt. "
                    "1 is usual; 1.1 to 1.5 where the subject hardly shows.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When in the sampling the subject sets in. 0 is usual; 0.05 to 0.1 leaves more of the "
                    "layout to the prompt, later costs likeness.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When in the sampling the subject stops. 1 is usual; 0.5 leaves the details to the prompt, "
                    "for a little likeness.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="Where in the picture the subject may show (white); elsewhere its word means the plain "
                    "class. Keeps two subjects apart. For a batch of pictures, one mask or one for each.",
                ),
                io.Boolean.Input(
                    "low_memory",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the subject's keys and values in the computer's memory and fetch them layer by "
                    "layer: slower, and for SDXL 0.34 GB of GPU memory less for each photo of each subject.",
                ),
                io.Float.Input(
                    "competition",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    optional=True,
                    tooltip="With several subjects: how much each place of the picture goes to one of them, so that "
                    "they do not mix. 0 leaves it to the prompt; try 1 to 3. The largest among the chained nodes "
                    "counts for all, so setting it in one is enough.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, clip, subject, placeholder: str, class_word: str, **choices) -> io.NodeOutput:
        words = {"placeholder": placeholder.strip(), "class_word": class_word.strip()}
        return io.NodeOutput(*apply_subject(model, clip, subject, **words, **choices, node_id=cls.hidden.unique_id))


NODES = [ApplySubject]
