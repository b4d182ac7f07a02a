"""Makes the pictures that ComfyUI's template gallery shows: beside workflows/<name>.json comes <name>.jpg.

It is the last picture that the workflow saves or shows. A workflow for a base model whose weights do not come with the
pack is run with the small model in the place of that, and the settings and words that it needs; its picture says so.
There is no LoRA and no ControlNet for the small model: they are left out, as if the user had bypassed their nodes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.environment import ensure_host, enter, say, take_no_options  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image

SIDE = 400
STUDIO = "NestedAttentionLoadStudio"
PHOTOS = ("studio_person.png", "studio_person_2.png")
SETTINGS = {  # of the workflows that are made for the small model
    "NestedAttentionLoadAdapter": {"adapter_name": "studio_person.safetensors"},
    "NestedAttentionApplySubject": {"class_word": ""},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "LatentUpscaleBy": {"scale_by": 1.25},  # it knows one size
    "KSampler": {"seed": 1, "steps": 20, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"},
}
STAND_INS = {  # a prompt that the small model knows the words of, and photos other than PHOTOS, if any
    "hires_second_pass_sdxl": ("a surprised <person> wearing a green shirt in the city",),
    "inpaint_face_sdxl": ("a happy <person>", "studio_person.png", "masked.png"),
    "load_subject": ("an angry <anna> wearing a white shirt in the forest",),
    "lora_controlnet_sdxl": ("a happy <person> wearing a blue sweater in the desert",),
    "one_subject_sd15": ("a winking <person> wearing a black blazer in the snow",),
    "one_subject_sdxl": ("a happy <person> wearing a red hoodie on the beach",),
    "save_subject": (),
    "several_photos_sdxl": ("a sad <person> wearing a pink sweater in the city", "studio_person.png", "mirrored.png"),
    "two_subjects_sdxl": ("a happy <anna> wearing a red hoodie and a sad <bob> wearing a blue blazer in the forest",),
}
BYPASSED = {"LoraLoader": ("model", "clip"), "ControlNetApplyAdvanced": ("positive", "negative")}  # what goes through


def main() -> None:
    take_no_options(__doc__)
    host = ensure_host()
    enter(host)
    from PIL import Image

    from scripts.server import running_server
    from scripts.workflow import read_graph, to_prompt

    with running_server(host) as client:
        for photo in (ROOT / "assets").glob("studio_*.png"):
            client.upload_image(photo)
        for photo in made_photos(host.base):
            client.upload_image(photo)
        # A subject is loaded after it was saved.
        workflows = sorted((ROOT / "workflows").glob("*.json"), key=lambda path: (path.stem == "load_subject", path))
        for path in workflows:
            prompt = to_prompt(read_graph(path), client.object_info())
            own = any(node["class_type"] == STUDIO for node in prompt.values())
            say(f"Running {path.name}")
            drawn = any("KSampler" in node["class_type"] for node in prompt.values())
            caption = "drawn by the pack's small model" if drawn and not own else ""
            if any(node["class_type"] in BYPASSED for node in prompt.values()):
                caption += ", without LoRA or ControlNet"
            if not own:
                prompt = with_small_model(prompt, *STAND_INS[path.stem])
            number = client.queue(prompt)
            client.wait(number)
            shown = client.images(number) or client.images(number, "temp")
            picture = Image.open(io.BytesIO(shown[-1])).convert("RGB")
            thumbnail(picture, caption).save(path.with_suffix(".jpg"), quality=88)


def with_small_model(prompt: dict[str, dict[str, Any]], text: str = "", *photos: str) -> dict[str, dict[str, Any]]:
    """The same graph with the small model for checkpoint and image encoder, a text for its prompt, and photos."""
    left, slots = list(photos or PHOTOS), {"CheckpointLoaderSimple": 0, "CLIPVisionLoader": 3}
    loaders = {number: slots[node["class_type"]] for number, node in prompt.items() if node["class_type"] in slots}
    made = {"0": {"class_type": STUDIO, "inputs": {}}}

    def source(link: list[Any]) -> list[Any]:
        number, slot = link
        if number in loaders:
            return ["0", loaders[number] + slot]
        through = BYPASSED.get(prompt[number]["class_type"])
        return link if through is None else source(prompt[number]["inputs"][through[slot]])

    for number, node in prompt.items():
        if number in loaders:
            continue
        inputs = {**node["inputs"], **SETTINGS.get(node["class_type"], {})}
        inputs = {name: source(value) if isinstance(value, list) else value for name, value in inputs.items()}
        if node["class_type"] == "LoadImage":
            inputs["image"] = left.pop(0)
        elif node["class_type"] == "CLIPTextEncode":
            inputs["text"] = text if "<" in inputs["text"] else ""
        made[number] = {**node, "inputs": inputs}
    return made


def made_photos(folder: Path) -> list[Path]:
    """The first photo mirrored, as another one of the same person; the second with a hole where the head is."""
    from PIL import Image, ImageDraw, ImageOps

    first, second = (Image.open(ROOT / "assets" / name).convert("RGB") for name in PHOTOS)
    masked = second.resize((64, 64), Image.Resampling.LANCZOS)
    opaque = Image.new("L", masked.size, 255)
    ImageDraw.Draw(opaque).rectangle((2, 0, 62, 46), fill=0)
    masked.putalpha(opaque)
    paths = [folder / "mirrored.png", folder / "masked.png"]
    for path, picture in zip(paths, (ImageOps.mirror(first), masked), strict=True):
        picture.save(path)
    return paths


def thumbnail(picture: Image.Image, caption: str) -> Image.Image:
    from PIL import ImageDraw, ImageOps

    from nested_attention.inspection.drawing import font

    size = (SIDE, SIDE)
    wide = picture.width > picture.height
    made = ImageOps.pad(picture, size, color="white") if wide else ImageOps.fit(picture, size, centering=(0.5, 0))
    if caption:
        draw = ImageDraw.Draw(made)
        draw.rectangle((0, SIDE - 30, SIDE, SIDE), fill="black")
        draw.text((SIDE // 2, SIDE - 15), caption, fill="white", anchor="mm", font=font(14))
    return made


if __name__ == "__main__":
    main()
