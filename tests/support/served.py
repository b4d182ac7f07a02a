"""Saved workflows on a real server, cut down to what a small machine draws in seconds."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from scripts.client import Client, Prompt
from scripts.environment import ROOT
from scripts.workflow import read_graph, to_prompt

WORKFLOWS = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
# Those that need no other weights.
SMALL = [name for name, path in WORKFLOWS.items() if "NestedAttentionLoadStudio" in path.read_text()]
PHOTOS = ("astronaut.png", "chelsea.png")
PIXELS = 128
STEPS = 2
NOTICE = "nested_attention.notice"


@dataclass(frozen=True)
class Studio:
    """A server with generated weights; `info` is its description of the node classes."""

    client: Client
    info: dict[str, Any]

    def prompt(self, workflow: str, base: str = "sd15", pixels: int = PIXELS) -> Prompt:
        """A saved workflow: with the small model as it is, otherwise with generated weights, our photographs, a small
        latent and few steps.
        """
        prompt = to_prompt(read_graph(WORKFLOWS[workflow]), self.info)
        if workflow in SMALL:
            return prompt
        changes = {
            "CheckpointLoaderSimple": {"ckpt_name": f"generated-{base}.safetensors"},
            "NestedAttentionLoadAdapter": {"adapter_name": f"generated-person-{base}.safetensors"},
            "CLIPVisionLoader": {"clip_name": "generated-vit-h.safetensors"},
            "EmptyLatentImage": {"width": pixels, "height": pixels},
            "KSampler": {"seed": 1, "steps": STEPS},
        }
        for node in prompt.values():
            node["inputs"].update(changes.get(node["class_type"], {}))
        for node_id, photo in zip(ids(prompt, "LoadImage"), PHOTOS, strict=False):
            prompt[node_id]["inputs"]["image"] = photo
        return prompt

    def draw(self, prompt: Prompt) -> np.ndarray:
        """The picture that a prompt saves. The sampler must have run, not the server's cache."""
        reached = set()
        (png,) = self.client.run(prompt, lambda progress: reached.add(progress.node_id))
        assert reached >= set(ids(prompt, "KSampler"))
        return pixels_of(png)


def with_few_steps(workflow: Path, folder: Path) -> Path:
    """A copy of a workflow that samples fast."""
    graph = read_graph(workflow)
    for node in graph["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = STEPS
    copy = folder / workflow.name
    copy.write_text(json.dumps(graph), encoding="utf-8")
    return copy


def ids(prompt: Prompt, class_type: str) -> list[str]:
    return [node_id for node_id, node in prompt.items() if node["class_type"] == class_type]


def change(prompt: Prompt, class_type: str, number: int = 0, **inputs: Any) -> str:
    """Change inputs of the so-manieth node of a class, in place; returns its id."""
    node_id = ids(prompt, class_type)[number]
    assert inputs.keys() <= prompt[node_id]["inputs"].keys()
    prompt[node_id]["inputs"].update(inputs)
    return node_id


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@contextmanager
def texts_on_nodes(client: Client) -> Iterator[tuple[Client, list[tuple[str, str]]]]:
    """A client to queue with while the block runs, and (node id, text) of what the server shows it on nodes."""
    listener = Client(client.address)
    found: list[tuple[str, str]] = []
    connected, finished = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_listen(listener, found, connected, finished)))
    thread.start()
    try:
        assert connected.wait(30)
        yield listener, found
    finally:
        finished.set()
        thread.join()


async def _listen(client: Client, found: list, connected: threading.Event, finished: threading.Event) -> None:
    address = f"{client.address}/ws?clientId={client.client_id}"
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        connected.set()
        while not finished.is_set():
            try:
                message = await socket.receive(timeout=0.2)
            except asyncio.TimeoutError:
                continue
            if message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                if event["type"] == NOTICE:
                    found.append((event["data"]["node_id"], event["data"]["text"]))
