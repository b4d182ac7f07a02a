"""Load the small model that comes with the pack."""

from __future__ import annotations

from comfy_api.latest import io

from ..nested_attention.host.studio import load_studio
from .sockets import CATEGORY


class LoadStudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionLoadStudio",
            display_name="Load Studio Model",
            category=CATEGORY,
            description="Loads the small model that comes with this pack, to try things out in seconds without any "
            "download: cartoon people and pets at 64 x 64 pixels. Its adapters are studio_person and studio_pet.",
            search_aliases=["nested attention", "example model", "tiny", "demo"],
            inputs=[],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(),
                io.ClipVision.Output(display_name="CLIP_VISION"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        base = load_studio()
        return io.NodeOutput(base.model, base.clip, base.vae, base.clip_vision)


NODES = [LoadStudio]
