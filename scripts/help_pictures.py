"""Makes the example pictures of the nodes' help, web/docs/images/<NodeId>.jpg, each by the node itself.

All but the cut-outs of photos are drawn by the small model that comes with the pack.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.environment import ensure_host, enter, say, take_no_options  # noqa: E402

TARGET = ROOT / "web" / "docs" / "images"
PHOTOS = ("studio_person.png", "studio_person_2.png", "studio_pet.png", "astronaut.png", "chelsea.png")
PROMPT = "a happy <person> wearing a blue hoodie in a city"
FACE = "203.5 101.5, 247.1 103.8, 223.4 130, 201.8 139.2, 245 141"  # of the astronaut
HEIGHT, WIDTH = 200, 1100
Output = tuple[str, int]


class Sheet:
    """A prompt for the server that is put together node by node, and what of it is shown."""

    def __init__(self, info: dict[str, Any]):
        self.info, self.prompt, self.captions = info, {}, []

    def add(self, kind: str, **inputs: Any) -> str:
        """A node, with the defaults of what is not given; its id."""
        required = self.info[kind]["input"].get("required", {})
        defaults = {name: _default(*spec) for name, spec in required.items() if name not in inputs}
        name = str(len(self.prompt) + 1)
        inputs = {key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()}
        self.prompt[name] = {"class_type": kind, "inputs": {**defaults, **inputs}}
        return name

    def show(self, caption: str, image: Output) -> None:
        self.captions.append(caption)
        self.add("SaveImage", images=image, filename_prefix="help")

    def photo(self, name: str) -> Output:
        return self.add("LoadImage", image=name), 0

    def studio(self) -> None:
        self.base = self.add("NestedAttentionLoadStudio")

    def subject(self, photo: Output, adapter: str = "studio_person.safetensors") -> str:
        loaded = self.add("NestedAttentionLoadAdapter", adapter_name=adapter)
        return self.add("NestedAttentionEncodeSubject", adapter=(loaded, 0), clip_vision=(self.base, 3), image=photo)

    def apply(self, subject: Output, **choices: Any) -> tuple[Output, Output]:
        node = self.add(
            "NestedAttentionApplySubject", model=(self.base, 0), clip=(self.base, 1), subject=subject, **choices
        )
        return (node, 0), (node, 1)

    def draw(self, model: Output, clip: Output, prompt: str = PROMPT) -> Output:
        texts = [(self.add("CLIPTextEncode", clip=clip, text=text), 0) for text in (prompt, "")]
        latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        settings = {"seed": 3, "steps": 20, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        sampled = self.add(
            "KSampler", model=model, positive=texts[0], negative=texts[1], latent_image=(latent, 0), **settings
        )
        return self.add("VAEDecode", samples=(sampled, 0), vae=(self.base, 2)), 0


def _default(kind: Any, options: dict[str, Any] | None = None) -> Any:
    options = options or {}
    choices = kind if isinstance(kind, list) else options.get("options", [None])
    return options.get("default", choices[0])


def load_studio(sheet: Sheet) -> None:
    sheet.studio()
    for prompt in ("a happy person", "a happy pet in a scarf"):
        sheet.show(prompt, sheet.draw((sheet.base, 0), (sheet.base, 1), prompt))


def load_adapter(sheet: Sheet) -> None:
    sheet.studio()
    for kind in ("person", "pet"):
        photo = sheet.photo(f"studio_{kind}.png")
        subject = sheet.subject(photo, f"studio_{kind}.safetensors")
        sheet.show(f"studio_{kind}", photo)
        drawn = sheet.apply((subject, 0), placeholder=f"<{kind}>")
        sheet.show("drawn with it", sheet.draw(*drawn, f"a happy <{kind}> in a city"))


def encode_subject(sheet: Sheet) -> None:
    sheet.studio()
    photo = sheet.photo("studio_person.png")
    subject = sheet.subject(photo)
    sheet.show("photo", photo)
    sheet.show("seen", (subject, 1))
    sheet.show("drawn", sheet.draw(*sheet.apply((subject, 0))))


def apply_subject(sheet: Sheet) -> None:
    sheet.studio()
    photo = sheet.photo("studio_person.png")
    subject = sheet.subject(photo)
    sheet.show("photo", photo)
    for strength in (0.0, 0.5, 1.0, 1.5):
        sheet.show(f"strength {strength:g}", sheet.draw(*sheet.apply((subject, 0), strength=strength)))


def combine_subjects(sheet: Sheet) -> None:
    sheet.studio()
    a, b = (sheet.subject(sheet.photo(name)) for name in ("studio_person.png", "studio_person_2.png"))
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        both = sheet.add(
            "NestedAttentionCombineSubjects", subject_a=(a, 0), subject_b=(b, 0), mode="blend", weight=weight
        )
        sheet.show(f"weight {weight:g}", sheet.draw(*sheet.apply((both, 0))))


def align_face(sheet: Sheet) -> None:
    photo = sheet.photo("astronaut.png")
    sheet.show("photo", photo)
    sheet.show("aligned", (sheet.add("NestedAttentionAlignFace", image=photo, points=FACE), 0))


def crop_subject(sheet: Sheet) -> None:
    photo = sheet.photo("chelsea.png")
    sheet.show("photo", photo)
    box = {"x": 60, "y": 20, "width": 290, "height": 260}
    for background in ("keep", "white", "blur"):
        cut = sheet.add("NestedAttentionCropSubject", image=photo, background=background, **box)
        sheet.show(f"background: {background}", (cut, 0))


def inspect(sheet: Sheet, view: str) -> None:
    sheet.studio()
    subject = sheet.subject(sheet.photo("studio_person.png"))
    model, clip = sheet.apply((subject, 0))
    record = sheet.add("NestedAttentionRecord", model=model)
    generated = sheet.draw((record, 0), clip)
    seen = {"photo": (subject, 1), "clip_vision": (sheet.base, 3)}
    shown = sheet.add(
        "NestedAttentionInspect", record=(record, 1), subject=(subject, 0), generated=generated, view=view,
        points="0.42,0.45; 0.5,0.15; 0.5,0.85", **seen,
    )  # fmt: skip
    sheet.show("", (shown, 0))


def record(sheet: Sheet) -> None:
    inspect(sheet, "attention")


def inspect_sheet(sheet: Sheet) -> None:
    inspect(sheet, "sheet")


def train(sheet: Sheet) -> None:
    """A handful of steps: what the node gives, not what it could."""
    sheet.studio()
    photo = sheet.photo("studio_person.png")
    small = {"resolution": 64, "buckets": False, "dim": 64, "depth": 1, "dim_head": 32, "tokens": 8, "warmup": 1}
    node = sheet.add(
        "NestedAttentionTrain", model=(sheet.base, 0), clip=(sheet.base, 1), vae=(sheet.base, 2),
        clip_vision=(sheet.base, 3), images=photo, name="help", class_word="person", steps=60, learning_rate=2e-3,
        preview_every=60, **small,
    )  # fmt: skip
    sheet.show("loss curve", (node, 1))
    sheet.show("sample, after 60 steps", (node, 2))


SHEETS = {
    "LoadStudio": load_studio,
    "LoadAdapter": load_adapter,
    "EncodeSubject": encode_subject,
    "ApplySubject": apply_subject,
    "CombineSubjects": combine_subjects,
    "AlignFace": align_face,
    "CropSubject": crop_subject,
    "Record": record,
    "Inspect": inspect_sheet,
    "Train": train,
}


def main() -> None:
    take_no_options(__doc__)
    host = ensure_host()
    enter(host)
    from PIL import Image

    from nested_attention.inspection.drawing import beside, captioned
    from scripts.server import running_server

    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, running_server(host, ["--output-directory", scratch]) as client:
        for name in PHOTOS:
            client.upload_image(ROOT / "assets" / name)
        for node, fill in SHEETS.items():
            sheet = Sheet(client.object_info())
            fill(sheet)
            pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in client.run(sheet.prompt)]
            if len(pictures) > 1:
                scaled = [p.resize((p.width * HEIGHT // p.height, HEIGHT), Image.Resampling.LANCZOS) for p in pictures]
                pictures = [beside([captioned(p, c) for p, c in zip(scaled, sheet.captions, strict=True)])]
            pictures[0].thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
            path = TARGET / f"NestedAttention{node}.jpg"
            pictures[0].save(path, quality=85)
            say(f"Saved {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
