"""From a fresh clone to a picture: sets everything up, starts a ComfyUI server and runs workflows/quickstart.json.

The weights are generated, not trained, so the picture is noise: what is shown is that every part runs.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.environment import Host, SetupError, ensure_host, enter, say  # noqa: E402
from scripts.generate_weights import ensure_weights  # noqa: E402

WORKFLOW = ROOT / "workflows" / "quickstart.json"
PHOTO = ROOT / "assets" / "astronaut.png"
PICTURE = ROOT / "output" / "quickstart.png"
WEIGHTS = ("sd15", "vit-h", "person-sd15")


def main() -> None:
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _leave)
    host = ensure_host()
    enter(host)
    ensure_weights(host, *WEIGHTS)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(_draw(host))
    say(f"Saved {PICTURE} after {time.monotonic() - started:.0f} s.")
    say("It is noise, since the weights are generated: real shapes, no training. The machinery is what was shown.")


def _draw(host: Host) -> bytes:
    """Run the quickstart workflow on a server of its own and return the picture."""
    from scripts.server import running_server
    from scripts.workflow import read_graph, to_prompt

    say("Starting ComfyUI")
    with running_server(host) as client:
        say(f"Uploading {PHOTO.name}")
        client.upload_image(PHOTO)
        prompt = to_prompt(read_graph(WORKFLOW), client.object_info())
        say(f"Running {WORKFLOW.relative_to(ROOT)}")
        titles = {node_id: node["_meta"]["title"] for node_id, node in prompt.items()}
        pictures = client.run(prompt, lambda progress: _show(titles[progress.node_id], progress.step, progress.steps))
    if not pictures:
        raise SetupError(f"{WORKFLOW.name} ran, but saved no picture: it needs a Save Image node.")
    return pictures[0]


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
