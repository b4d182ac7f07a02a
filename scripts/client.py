"""A small client for the HTTP and websocket interface of a ComfyUI server."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests

POLL_SECONDS = 5.0
REQUEST_SECONDS = 60.0

Prompt = dict[str, dict[str, Any]]


class ServerError(Exception):
    """The server did not do what was asked."""


class NodeError(ServerError):
    """A node refused its inputs or failed while running."""

    def __init__(self, node_id: str, class_type: str, message: str, kind: str = "") -> None:
        super().__init__(f"{class_type} (node {node_id}): {message}")
        self.node_id = node_id
        self.class_type = class_type
        self.message = message
        self.kind = kind


class Interrupted(ServerError):
    """The run was stopped by an interrupt."""


@dataclass(frozen=True)
class Progress:
    """A node has begun (steps 0) or has done so many of its steps."""

    node_id: str
    step: int = 0
    steps: int = 0


class Client:
    """Talks to one server; runs queued by it report their progress to it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client_id = uuid.uuid4().hex

    def get(self, path: str, **query: str) -> Any:
        """The JSON answer to a GET request."""
        return self._checked(requests.get(self.address + path, params=query, timeout=REQUEST_SECONDS)).json()

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        """Send JSON; the caller looks at the status."""
        return requests.post(self.address + path, json=body, timeout=REQUEST_SECONDS)

    def object_info(self) -> dict[str, Any]:
        """The description of every node class of the server."""
        return self.get("/object_info")

    def upload_image(self, path: Path) -> str:
        """Put an image file into the server's input folder; returns the name for LoadImage."""
        with path.open("rb") as file:
            response = requests.post(
                self.address + "/upload/image",
                files={"image": (path.name, file)},
                data={"overwrite": "true"},
                timeout=REQUEST_SECONDS,
            )
        stored = self._checked(response).json()
        return "/".join(part for part in (stored["subfolder"], stored["name"]) if part)

    def queue(self, prompt: Prompt) -> str:
        """Queue a workflow in API form and return its id; raises NodeError where a node's inputs are refused."""
        response = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
        answer = response.json()
        for node_id, refused in answer.get("node_errors", {}).items():
            for error in refused["errors"]:
                message = f"{error['message']}: {error['details']}" if error["details"] else error["message"]
                raise NodeError(node_id, refused["class_type"], message, error["type"])
        if not response.ok:
            raise ServerError(answer["error"]["message"])
        return answer["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What the server recorded of a run, or None as long as it has not ended."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self) -> None:
        """Stop the run that is going on."""
        self._checked(self.post("/interrupt", {}))

    def wait(
        self,
        prompt_id: str,
        on_progress: Callable[[Progress], None] | None = None,
        timeout: float = 3600.0,
    ) -> dict[str, Any]:
        """Wait for the end of a run and return its history; raises NodeError or Interrupted if it did not succeed."""
        record = asyncio.run(self._follow(prompt_id, on_progress, time.monotonic() + timeout))
        _raise_failure(record["status"]["messages"])
        return record

    def run(self, prompt: Prompt, on_progress: Callable[[Progress], None] | None = None) -> list[bytes]:
        """Queue a workflow, wait for it and return the pictures that it saved."""
        prompt_id = self.queue(prompt)
        self.wait(prompt_id, on_progress)
        return self.images(prompt_id)

    def images(self, prompt_id: str, kind: str = "output") -> list[bytes]:
        """The saved pictures of a finished run as PNG bytes, by node; kind "temp" gives the previews."""
        outputs = (self.history(prompt_id) or {"outputs": {}})["outputs"]
        named = [image for node in sorted(outputs, key=int) for image in outputs[node].get("images", [])]
        return [self._view(image) for image in named if image["type"] == kind]

    def _view(self, image: dict[str, str]) -> bytes:
        return self._checked(requests.get(self.address + "/view", params=image, timeout=REQUEST_SECONDS)).content

    async def _follow(
        self, prompt_id: str, on_progress: Callable[[Progress], None] | None, deadline: float
    ) -> dict[str, Any]:
        """Pass progress on until the history has the run; messages only say when to look there."""
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.address}/ws?clientId={self.client_id}", max_msg_size=0) as socket:
                while time.monotonic() < deadline:
                    record = await asyncio.to_thread(self.history, prompt_id)
                    if record is not None:
                        return record
                    await _pass_on(socket, prompt_id, on_progress)
        raise ServerError(f"The run {prompt_id} did not end in time.")

    def _checked(self, response: requests.Response) -> requests.Response:
        if not response.ok:
            raise ServerError(f"{response.url} answered {response.status_code}: {response.text[:500]}")
        return response


async def _pass_on(
    socket: aiohttp.ClientWebSocketResponse, prompt_id: str, on_progress: Callable[[Progress], None] | None
) -> None:
    """Report the progress of one run until a message says that it ended, or for a few seconds."""
    deadline = time.monotonic() + POLL_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        try:
            message = await socket.receive(timeout=left)
        except asyncio.TimeoutError:
            return
        if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING):
            raise ServerError("The server closed the connection.")
        if message.type != aiohttp.WSMsgType.TEXT:
            continue
        event = json.loads(message.data)
        if event["data"].get("prompt_id") != prompt_id:
            continue
        if event["type"] == "executing" and event["data"]["node"] is None:
            return
        if on_progress is not None and (progress := _progress(event)) is not None:
            on_progress(progress)


def _progress(event: dict[str, Any]) -> Progress | None:
    data = event["data"]
    if event["type"] == "executing":
        return Progress(node_id=data["node"])
    if event["type"] == "progress" and data["node"] is not None:
        return Progress(node_id=data["node"], step=int(data["value"]), steps=int(data["max"]))
    return None


def _raise_failure(messages: list[tuple[str, dict[str, Any]]]) -> None:
    for name, data in messages:
        if name == "execution_interrupted":
            raise Interrupted(f"The run was interrupted in {data['node_type']} (node {data['node_id']}).")
        if name == "execution_error":
            message, kind = data["exception_message"].strip(), data["exception_type"]
            raise NodeError(data["node_id"], data["node_type"], message, kind)
