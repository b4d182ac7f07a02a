"""Load an adapter, and save one."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..nested_attention.adapter import FEATURE_LAYERS
from ..nested_attention.attention import NORMS
from ..nested_attention.host.adapters import load_adapter, save_adapter
from ..nested_attention.host.notice import show
from .folders import ADAPTERS, choices, full_path, modified, new_file
from .sockets import CATEGORY, Adapter

OWN = "adapter's own"


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionLoadAdapter",
            display_name="Load Nested Adapter",
            category=CATEGORY,
            description="Loads an adapter that turns photos of a subject into one word of the prompt.",
            search_aliases=["nested attention", "personalization", "ip-adapter", "face", "identity"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=choices(ADAPTERS),
                    tooltip="The adapter file, from models/nested_attention. It belongs to one base model (SDXL, SD "
                    "1.5) and one kind of subject (faces, pets).",
                ),
                io.Combo.Input(
                    "feature_layer",
                    options=[OWN, *FEATURE_LAYERS],
                    tooltip="Which features of the image encoder the adapter reads. Leave it to the adapter; try the "
                    "other one if a foreign file gives no likeness.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "norm",
                    options=[OWN, *NORMS],
                    tooltip="How the size of the subject's values is kept near the text's. rescale: always to the "
                    "adapter's factor; clamp: only where larger; off: not at all. Leave it to the adapter.",
                    advanced=True,
                ),
            ],
            outputs=[Adapter.Output(display_name="adapter")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, **_: object) -> float:
        return modified(ADAPTERS, adapter_name)

    @classmethod
    def execute(cls, adapter_name: str, feature_layer: str, norm: str) -> io.NodeOutput:
        adapter = load_adapter(
            full_path(ADAPTERS, adapter_name),
            adapter_name,
            feature_layer=None if feature_layer == OWN else feature_layer,
            norm=None if norm == OWN else norm,
        )
        return io.NodeOutput(adapter)


class SaveAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionSaveAdapter",
            display_name="Save Nested Adapter",
            category=CATEGORY,
            description="Saves an adapter to models/nested_attention, where Load Nested Adapter finds it.",
            inputs=[
                Adapter.Input("adapter", tooltip="The adapter to save, from Train Nested Adapter or a loader."),
                io.String.Input(
                    "filename_prefix",
                    default="adapter",
                    tooltip="Name of the file; a number is added, nothing is ever overwritten. A / makes subfolders.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter, filename_prefix: str) -> io.NodeOutput:
        path, shown = new_file(ADAPTERS, filename_prefix)
        save_adapter(adapter, path)
        show(report := f"Saved as {shown}", cls.hidden.unique_id)
        return io.NodeOutput(ui=ui.PreviewText(report))


NODES = [LoadAdapter, SaveAdapter]
