"""See inside: record what a run attends to, and draw it."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..nested_attention.host.inspection import VIEWS, inspect
from ..nested_attention.host.recording import record_model
from ..nested_attention.inspection.views import parse_points
from .sockets import CATEGORY, Subject

Record = io.Custom("NESTED_RECORD")


class RecordAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionRecord",
            display_name="Record Nested Attention",
            category=CATEGORY,
            description="Records where subjects are attended while a sampler runs with this model, for Inspect Nested "
            "Attention. The picture stays the same, bit for bit. Kept in main memory, up to a limit.",
            search_aliases=["attention map", "visualize", "debug"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="From the last Apply Subject. The model that comes out goes to the sampler."
                ),
                io.String.Input(
                    "steps",
                    default="all",
                    tooltip="Which steps: all, last, numbers from 1, or ranges: 1-4, 10, last. Values and points are "
                    "shown of the last at which the subject acts. Fewer cost less time.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip="Which cross-attention layers, by parts of their names, such as output, input 4., middle "
                    "or 32x32, with commas between. Empty: all.",
                ),
                io.Int.Input(
                    "picture",
                    default=0,
                    min=0,
                    max=4095,
                    tooltip="Which picture of a batch is recorded, from 0. Beyond the batch: its last.",
                    advanced=True,
                ),
                io.Int.Input(
                    "limit_mb",
                    default=512,
                    min=1,
                    max=65536,
                    tooltip="Main memory that a record may take. SDXL at 1024x1024 takes about 220 MB in half "
                    "precision, with all layers and 20 steps. What does not fit is left out, and the node says so.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(), Record.Output(display_name="record")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, steps: str, layers: str, picture: int, limit_mb: int) -> io.NodeOutput:
        limit = limit_mb * 2**20
        return io.NodeOutput(
            *record_model(model, steps=steps, layers=layers, picture=picture, limit=limit, node_id=cls.hidden.unique_id)
        )


class InspectAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionInspect",
            display_name="Inspect Nested Attention",
            category=CATEGORY,
            description="Draws what a subject's word did in a picture: where it was attended, its value at each place, "
            "which nested tokens chosen points looked up, and what those saw in the photo.",
            search_aliases=["attention map", "visualize", "debug"],
            inputs=[
                Record.Input("record", tooltip="From Record Nested Attention, whose model the sampler used."),
                Subject.Input("subject", tooltip="The subject to look at, as Apply Subject has it."),
                io.Image.Input("generated", tooltip="The picture that the sampler made, after VAE Decode."),
                io.Combo.Input(
                    "view",
                    options=list(VIEWS),
                    tooltip="sheet: all in one. owners: which of several subjects has which place. Changing the view "
                    "or the points does not sample again.",
                ),
                io.String.Input(
                    "points",
                    default="0.4,0.4; 0.6,0.4; 0.5,0.6",
                    tooltip="Places of the generated picture, x,y from 0,0 at the top left to 1,1 at the bottom right, "
                    "with ; between them. An eye and a mouth, say.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip="Which of the recorded layers to show or average, by parts of their names, such as output "
                    "or 32x32. Empty: all.",
                ),
                io.Image.Input(
                    "photo",
                    optional=True,
                    tooltip="The subject's photo: connect 'seen' of Encode Subject. Needed to show what tokens saw.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image encoder that made the subject. Needed, with the photo, to show what tokens saw.",
                ),
            ],
            outputs=[io.Image.Output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, record, subject, generated, view: str, points: str, layers: str, photo=None, clip_vision=None
    ) -> io.NodeOutput:
        prompt = cls.hidden.prompt or {}
        record.require_run(prompt, prompt.get(cls.hidden.unique_id, {}).get("inputs", {}).get("generated"))
        inspection = inspect(
            record,
            subject,
            generated,
            layers=layers,
            points=parse_points(points),
            photos=photo,
            clip_vision=clip_vision,
        )
        sheet = inspection.draw(view)
        # The picture goes along for web/points.js, where points are picked.
        shown = {"generated": ui.PreviewImage(inspection.picture[None], cls=cls).as_dict()["images"]}
        return io.NodeOutput(sheet, ui={**ui.PreviewImage(sheet, cls=cls).as_dict(), **shown})


NODES = [RecordAttention, InspectAttention]
