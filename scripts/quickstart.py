"""From a fresh clone to a picture: sets everything up, starts a ComfyUI server and runs workflows/quickstart.json.

The small model that comes with the pack draws each prompt twice, with the photos' subjects and without, and one sheet
shows them side by side.
"""

from __future__ import annotations

import io
import signal
import sys
import textwrap
import time
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.environment import Host, SetupError, ensure_host, enter, say, take_no_options  # noqa: E402

WORKFLOW = ROOT / "workflows" / "quickstart.json"
PICTURE = ROOT / "output" / "quickstart.png"


def main() -> None:
    take_no_options(__doc__)
    signal.signal(signal.SIGTERM, _leave)
    host = ensure_host()
    enter(host)
    started = time.monotonic()
    PICTURE.parent.mkdir(exist_ok=True)
    _draw(host).save(PICTURE)
    say(f"Saved {PICTURE} after {time.monotonic() - started:.0f} s.")


def _draw(host: Host) -> Any:
    """Run the quickstart workflow on a server of its own, with the subjects and without: a sheet of both."""
    from scripts.server import running_server
    from scripts.workflow import read_graph, to_prompt

    say("Starting ComfyUI")
    with running_server(host) as client:
        prompt = to_prompt(read_graph(WORKFLOW), client.object_info())
        nodes = {kind: [n for n in prompt.values() if n["class_type"] == kind] for kind in (LOAD, APPLY, TEXT)}
        photos = [ROOT / "assets" / node["inputs"]["image"] for node in nodes[LOAD]]
        for photo in photos:
            say(f"Uploading {photo.name}")
            client.upload_image(photo)
        titles = {node_id: node["_meta"]["title"] for node_id, node in prompt.items()}
        say(f"Running {WORKFLOW.relative_to(ROOT)}")
        drawn = client.run(prompt, lambda progress: _show(titles[progress.node_id], progress.step, progress.steps))
        say("Running it again without the subjects (strength 0)")
        for node in nodes[APPLY]:
            node["inputs"]["strength"] = 0.0
        plain = client.run(prompt)
    texts = [node["inputs"]["text"] for node in nodes[TEXT] if node["inputs"]["text"]]
    if not len(texts) == len(drawn) == len(plain):
        raise SetupError(f"{WORKFLOW.name} has {len(texts)} prompts and saved {len(drawn)} pictures.")
    return _sheet([photo.read_bytes() for photo in photos], texts, drawn, plain)


LOAD, APPLY, TEXT = "LoadImage", "NestedAttentionApplySubject", "CLIPTextEncode"


def _sheet(photos: list[bytes], texts: list[str], drawn: list[bytes], plain: list[bytes]) -> Any:
    """The photos on the left; beside them each prompt with its two pictures."""
    from PIL import Image

    from nested_attention.inspection.drawing import beside, captioned, framed, stacked

    def panel(png: bytes, caption: str) -> Any:
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        return captioned(picture.resize((256, 256), Image.Resampling.LANCZOS), caption)

    subjects = stacked([panel(photo, f"photo {i}") for i, photo in enumerate(photos, 1)])
    columns = [
        stacked([panel(first, textwrap.fill(text, 28)), panel(second, "without the photos")])
        for text, first, second in zip(texts, drawn, plain, strict=True)
    ]
    return framed(beside([subjects, *columns]))


def _show(title: str, step: int, steps: int) -> None:
    say(f"  {title}" + (f" {step}/{steps}" if steps else ""))


def _leave(signum: int, frame: FrameType | None) -> None:
    """Unwind on SIGTERM as on Ctrl-C, so that the server is stopped."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"The quickstart failed: {error}")
