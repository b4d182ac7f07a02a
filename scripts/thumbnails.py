"""Makes the pictures that ComfyUI's template gallery shows: each workflow of the small model, run as it is.

Beside workflows/<name>.json comes <name>.jpg: the last picture that the workflow saves. Workflows for other base models
have none, since their weights do not come with the pack.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.environment import ensure_host, enter, say  # noqa: E402

SIDE = 400
LOADER = "NestedAttentionLoadStudio"


def main() -> None:
    host = ensure_host()
    enter(host)
    from PIL import Image, ImageOps

    from scripts.server import running_server
    from scripts.workflow import read_graph, to_prompt

    with running_server(host) as client:
        for photo in (ROOT / "assets").glob("studio_*.png"):
            client.upload_image(photo)
        for path in sorted((ROOT / "workflows").glob("*.json")):
            prompt = to_prompt(read_graph(path), client.object_info())
            if all(node["class_type"] != LOADER for node in prompt.values()):
                continue
            say(f"Running {path.name}")
            picture = Image.open(io.BytesIO(client.run(prompt)[-1])).convert("RGB")
            ImageOps.fit(picture, (SIDE, SIDE)).save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
