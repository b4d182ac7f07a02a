"""Remakes the screenshots: workflows for the README, and for the help those nodes that say something, after a run.

All in ComfyUI's own front end, drawn by the small model of the pack.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.environment import SetupError, ensure_host, enter, say, take_no_options  # noqa: E402

if TYPE_CHECKING:
    from scripts.browser import Canvas
    from scripts.client import Client

TARGET = ROOT / "assets" / "screenshots"
HELP = ROOT / "web" / "docs" / "images"
WORKFLOWS = ROOT / "workflows"
WAYS = {  # nodes after those that they need: what is chosen in each, and which output of which goes into each input
    "NestedAttentionLoadStudio": ([], {}),
    "NestedAttentionLoadAdapter": (["studio_person.safetensors"], {}),
    "LoadImage": (["studio_person.png", "image"], {}),
    "NestedAttentionEncodeSubject": (
        [],
        {
            "adapter": ("NestedAttentionLoadAdapter", 0),
            "clip_vision": ("NestedAttentionLoadStudio", 3),
            "image": ("LoadImage", 0),
        },
    ),
    "NestedAttentionSaveSubject": (["friends/anna"], {"subject": ("NestedAttentionEncodeSubject", 0)}),
    "NestedAttentionSaveAdapter": (["people/anna"], {"adapter": ("NestedAttentionLoadAdapter", 0)}),
    "NestedAttentionApplySubject": (
        [],
        {
            "model": ("NestedAttentionLoadStudio", 0),
            "clip": ("NestedAttentionLoadStudio", 1),
            "subject": ("NestedAttentionEncodeSubject", 0),
        },
    ),
    "NestedAttentionPromptInfo": (
        ["a happy (<person>:1.2) wearing a red hoodie"],
        {"clip": ("NestedAttentionApplySubject", 1)},
    ),
}
SAYS = {
    "NestedAttentionSaveSubject": "Saved as",
    "NestedAttentionSaveAdapter": "Saved as",
    "NestedAttentionPromptInfo": "Subjects:",
}


def main() -> None:
    take_no_options(__doc__)
    enter(ensure_host())
    from scripts.browser import BrowserError

    TARGET.mkdir(exist_ok=True)
    try:
        with _server() as client:
            _quickstart(client)
            _inspect(client)
            _help(client)
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
        paths = Path(scratch) / "paths.yaml"
        own = {name: str(Path(scratch) / name) for name in ("nested_attention", "nested_attention_subjects")}
        paths.write_text(json.dumps({"own": own}))  # which is YAML too
        options += ["--extra-model-paths-config", str(paths)]
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


def _help(client: Client) -> None:
    """Nodes that say something, after they ran; and a saved subject, which is in the list only then."""
    from playwright.sync_api import expect

    from scripts.browser import open_canvas

    loaded = {"NestedAttentionLoadSubject": ([str(Path("friends", "anna_00001_.safetensors"))], {})}
    for ways, says in ((WAYS, SAYS), (loaded, {"NestedAttentionLoadSubject": "anna_00001_"})):
        with open_canvas(client) as canvas, tempfile.TemporaryDirectory() as scratch:
            canvas.open(_graph(ways, Path(scratch) / "help.json"))
            if ways is WAYS:
                canvas.run()
            for kind, said in says.items():
                node = canvas.node([*ways].index(kind) + 1)
                expect(node).to_contain_text(said)
                canvas.fit([*ways].index(kind) + 1)
                path = HELP / f"{kind}.jpg"
                node.screenshot(path=path, type="jpeg", quality=85)
                say(f"Saved {path.relative_to(ROOT)}")


def _graph(ways: dict[str, tuple[list[Any], dict[str, tuple[str, int]]]], path: Path) -> Path:
    """A workflow file of nodes side by side, numbered from 1."""
    nodes, links = [], []
    for i, (kind, (chosen, inputs)) in enumerate(ways.items(), 1):
        sockets = []
        for slot, (name, (source, output)) in enumerate(inputs.items()):
            links.append([len(links) + 1, [*ways].index(source) + 1, output, i, slot, "*"])
            sockets.append({"name": name, "type": "*", "link": len(links)})
        node = {"id": i, "type": kind, "pos": [600 * (i % 4), 700 * (i // 4)], "size": [420, 200], "inputs": sockets}
        nodes.append(node | ({"widgets_values": chosen} if chosen else {}))
    path.write_text(json.dumps({"version": 0.4, "nodes": nodes, "links": links}))
    return path


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
