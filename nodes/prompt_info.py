"""Show how the text encoders read a prompt."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..nested_attention.host.notice import show
from ..nested_attention.host.prompt_info import describe_prompt
from .sockets import CATEGORY


class PromptInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionPromptInfo",
            display_name="Prompt Info",
            category=CATEGORY,
            description="Shows a prompt as each text encoder reads it: tokens, subjects, and what is cut off.",
            inputs=[
                io.Clip.Input("clip", tooltip="From Apply Subject: it knows the placeholders."),
                io.String.Input("text", multiline=True, tooltip="The prompt to explain; nothing is encoded."),
            ],
            outputs=[io.String.Output(display_name="info")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip, text: str) -> io.NodeOutput:
        info = describe_prompt(clip, text)
        show(info, cls.hidden.unique_id)  # the front end draws a PreviewText on nodes of its own only
        return io.NodeOutput(info, ui=ui.PreviewText(info))


NODES = [PromptInfo]
