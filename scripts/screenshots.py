"""Remakes the screenshots of the README: workflows in ComfyUI's own front end, drawn by the small model of the pack."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.environment import SetupError, ensure_host, enter, say  # noqa: E402

if TYPE_CHECKING:
    from scripts.browser import Canvas
    from scripts.client import Client

TARGET = ROOT / "assets" / "screenshots"
WORKFLOWS = ROOT / "workflows"


def main() -> None:
    enter(ensure_host())
    from scripts.browser import BrowserError

    TARGET.mkdir(exist_ok=True)
    try:
        with _server() as client:
            _quickstart(client)
            _inspect(client)
    except BrowserError as error:
        raise SetupError(str(error)) from error


@contextmanager
def _server() -> Iterator[Client]:
    """A server whose folders are empty but for the photos."""
    from scripts.server import running_server

    with tempfile.TemporaryDirectory() as scratch:
        options = []
        for name in ("input", "output", "user"):
            (Path(scratch) / name).mkdir()
            options += [f"--{name}-directory", str(Path(scratch) / name)]
        say("Starting ComfyUI")
        with running_server(ensure_host(), options) as client:
            for photo in (ROOT / "assets").glob("studio_*.png"):
                client.upload_image(photo)
            yield client


def _quickstart(client: Client) -> None:
    """The whole workflow after its run, then the help of one of its nodes."""
    from scripts.browser import open_canvas

    with open_canvas(client) as canvas:
        nodes = _run(canvas, "quickstart")
        _save(canvas, "quickstart")
        canvas.help(nodes["NestedAttentionApplySubject"][0]).get_by_text("class_word").first.wait_for()
        canvas.settle()
        _save(canvas, "help")


def _inspect(client: Client) -> None:
    """The sheet, close enough to be read."""
    from scripts.browser import open_canvas

    with open_canvas(client) as canvas:
        nodes = _run(canvas, "inspect")
        canvas.fit(*nodes["NestedAttentionInspect"])
        _save(canvas, "inspect")


def _run(canvas: Canvas, workflow: str) -> dict[str, list[int]]:
    """Draw with a workflow, until each node that saves shows its picture; its nodes by class."""
    from scripts.workflow import read_graph

    path = WORKFLOWS / f"{workflow}.json"
    nodes: dict[str, list[int]] = {}
    for node in read_graph(path)["nodes"]:
        nodes.setdefault(node["type"], []).append(node["id"])
    say(f"Running {path.name}")
    canvas.open(path)
    canvas.run()
    for node_id in nodes["SaveImage"]:
        canvas.picture(node_id)
    canvas.settle()
    return nodes


def _save(canvas: Canvas, name: str) -> None:
    path = TARGET / f"{name}.png"
    canvas.page.screenshot(path=path)
    say(f"Saved {path.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"The screenshots failed: {error}")
