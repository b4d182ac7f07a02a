"""Nested Attention for ComfyUI: one photo of a subject becomes one word of the prompt."""

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .nodes import adapter, apply, inspect, picture, prompt_info, studio, subject, train
from .nodes.folders import register_folders

WEB_DIRECTORY = "./web"


class NestedAttentionExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        register_folders()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        modules = studio, adapter, picture, subject, apply, inspect, prompt_info, train
        return [node for module in modules for node in module.NODES]


async def comfy_entrypoint() -> NestedAttentionExtension:
    return NestedAttentionExtension()
