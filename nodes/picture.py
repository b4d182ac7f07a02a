"""Cut the subject out of its photo."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..nested_attention.alignment import SIZE, cut_square, square_of
from ..nested_attention.crop import BACKGROUNDS, GREY, area_of, cut
from ..nested_attention.host.faces import ORDERS, find_faces
from ..nested_attention.host.images import as_batch, as_rgb, check_mask, fit, masks_of
from ..nested_attention.host.notice import show, warn
from .sockets import CATEGORY

FaceLandmarks = io.Custom("FACE_LANDMARKS")


class AlignFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionAlignFace",
            display_name="Align Face",
            category=CATEGORY,
            description="Cuts a face out of a photo, turned upright, as adapters for faces were trained on it (FFHQ).",
            search_aliases=["nested attention", "face crop", "ffhq", "align", "face landmarks"],
            inputs=[
                io.Image.Input("image", tooltip="The photo; a batch is several photos, each gives one face."),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    tooltip="Where a photo has several faces: how they are counted for 'index'.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=15,
                    tooltip="Which face in that order, from 0. The detector finds only one unless its num_faces is "
                    "raised.",
                ),
                io.Combo.Input(
                    "without_face",
                    options=["error", "whole image"],
                    tooltip="What happens where there is no such face. error: the run stops and says so; whole image: "
                    "the photo is passed on as it is, and the node says so.",
                ),
                io.String.Input(
                    "points",
                    default="",
                    tooltip="Instead of landmarks: x and y of both eyes, the nose and both corners of the mouth in "
                    "pixels, 10 numbers a photo. Empty: the landmarks are used.",
                    advanced=True,
                ),
                FaceLandmarks.Input(
                    "face_landmarks",
                    optional=True,
                    tooltip="From Detect Face Landmarks (MediaPipe), made from the same photo.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The aligned face, 512 x 512 pixels.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, image, order: str, index: int, without_face: str, points: str, face_landmarks=None
    ) -> io.NodeOutput:
        image = as_rgb(image).float()  # points and antialiasing need it
        faces = find_faces(image, face_landmarks, points, order, index)
        missing = [str(i + 1) for i, face in enumerate(faces) if face is None]
        if missing and without_face == "error":
            raise ValueError(
                f"Photo {', '.join(missing)} of {len(faces)} has no face {index} ({order}, counted from 0). Take "
                "another photo, lower 'index' or the detector's min_confidence, or choose 'whole image' at "
                "'without_face'."
            )
        if missing:
            which = f"photo {', '.join(missing)} of {len(faces)}"
            warn(f"No face was found in {which}: it is used whole.", cls.hidden.unique_id)
        if len(missing) < len(faces):
            # Beside aligned faces a whole photo has to be of their size.
            image = torch.cat(
                [
                    fit(photo[None], SIZE, "pad") if face is None else cut_square(photo, square_of(face))[None]
                    for photo, face in zip(image, faces, strict=True)
                ]
            )
        if not missing:
            show(f"{len(faces)} of {len(faces)} photos aligned.", cls.hidden.unique_id)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class CropSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NestedAttentionCropSubject",
            display_name="Crop Subject",
            category=CATEGORY,
            description="Cuts a pet or a thing out of a photo, by a mask or a box.",
            search_aliases=["nested attention", "crop", "cut out", "background"],
            inputs=[
                io.Image.Input("image", tooltip="The photo; a batch is several photos, each is cropped by itself."),
                io.Float.Input(
                    "margin",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Space around the subject, as a part of its longer side. 0.1 is usual.",
                ),
                io.Boolean.Input(
                    "square",
                    default=True,
                    tooltip="Make the crop square, as image encoders see it: then nothing is cut off later.",
                ),
                io.Combo.Input(
                    "background",
                    options=list(BACKGROUNDS),
                    tooltip="What is seen around the subject. keep: the photo; white: nothing; blur: the photo, "
                    "blurred. With a box, all outside it is background.",
                ),
                *(
                    io.Int.Input(name, default=0, min=0, max=16384, tooltip=f"{what} Without a mask, or beside it.")
                    for name, what in (
                        ("x", "Left edge of the subject's box, in pixels."),
                        ("y", "Top edge of the subject's box, in pixels."),
                        ("width", "Width of the subject's box, in pixels; 0 is no box."),
                        ("height", "Height of the subject's box, in pixels; 0 is no box."),
                    )
                ),
                io.Mask.Input("mask", optional=True, tooltip="The subject's area, white on black."),
            ],
            outputs=[io.Image.Output(display_name="image")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, image, margin: float, square: bool, background: str, x: int, y: int, width: int, height: int, mask=None
    ) -> io.NodeOutput:
        image = as_rgb(image)
        check_mask(mask, image, cls.hidden.unique_id)
        box = (x, y, width, height) if width and height else None
        areas = [area_of(*image.shape[1:3], each, box) for each in masks_of(mask, len(image))]
        crops = as_batch(
            [cut(photo, area, margin, square, background) for photo, area in zip(image, areas, strict=True)],
            beyond=1.0 if background == "white" else GREY,
        )
        return io.NodeOutput(crops, ui=ui.PreviewImage(crops, cls=cls))


NODES = [AlignFace, CropSubject]
