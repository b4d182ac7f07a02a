"""Drives the web front end of a ComfyUI server in a headless Chromium, as a user would."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect, sync_playwright

from scripts.client import Client
from scripts.workflow import read_graph

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
SIZE = {"width": 1600, "height": 1000}
WAIT_SECONDS = float(os.environ.get("BROWSER_WAIT_SECONDS", "60"))
# Nodes as elements of the page, so that what they show can be read; no greeting in the way.
SETTINGS = {"Comfy.VueNodes.Enabled": True, "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
SETTINGS |= {"Comfy.RightSidePanel.IsOpen": False}
SETTINGS |= {"Comfy.Graph.CanvasInfo": False, "Comfy.Notification.ShowVersionUpdates": False}

DROP = """([name, text]) => {
    app.graph.nodes.forEach(node => node.old = true)  // the next workflow may look the same
    const canvas = document.querySelector("#graph-canvas")
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(new File([text], name, {type: "application/json"}))
    for (const type of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer}))
}"""
OPENED = """([name, ids]) =>
    app.extensionManager.workflow.activeWorkflow?.filename.startsWith(name)
    && !app.graph.nodes.some(node => node.old)
    && JSON.stringify(app.graph.nodes.map(node => String(node.id)).sort()) === ids"""
FIT = """async ids => {
    app.canvas.selectItems(ids.map(id => app.graph.getNodeById(id)))
    await app.extensionManager.command.execute("Comfy.Canvas.FitView")
    app.canvas.deselectAll()
}"""
UNKNOWN = "() => app.graph.nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)"
FAILED = "() => app.lastExecutionError ? Number(app.lastExecutionError.node_id) : null"
# Titles are drawn above the place that a node states, and are part of it here.
BOXES = "() => app.graph.nodes.map(n => [`${n.id} ${n.title}`, n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])"
BUSY = ".p-blockui-mask"


class BrowserError(Exception):
    """There is no browser, or it did not do what was asked."""


def find_chromium() -> str:
    """The system's Chromium or Chrome, or the one that CHROMIUM_PATH names."""
    found = os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        raise BrowserError(f"There is no browser: install one of {', '.join(NAMES)}, or set CHROMIUM_PATH.")
    return found


@dataclass(frozen=True)
class Canvas:
    """A page with the front end in it. Nodes go by the ids of the workflow file."""

    page: Page

    def open(self, path: Path) -> None:
        """Drop a workflow file on the canvas and wait until its nodes are there."""
        ids = sorted(str(node["id"]) for node in read_graph(path)["nodes"])
        self.page.evaluate(DROP, [path.name, path.read_text(encoding="utf-8")])
        self.page.wait_for_function(OPENED, arg=[path.stem, json.dumps(ids, separators=(",", ":"))])
        self.fit()

    def fit(self, *node_ids: int) -> None:
        """Show the whole workflow, or some of its nodes."""
        self.page.evaluate(FIT, list(node_ids))
        self.settle()

    def settle(self) -> None:
        """Let what moves or fades come to rest, and what covers the page while it loads go."""
        expect(self.page.locator(BUSY)).to_have_count(0)
        self.page.wait_for_timeout(1000)

    def node(self, node_id: str | int) -> Locator:
        return self.page.locator(f'[data-node-id="{node_id}"]')

    def unknown_types(self) -> list[str]:
        """Types of nodes that the front end does not know, and draws red."""
        return self.page.evaluate(UNKNOWN)

    def boxes(self) -> list[tuple[str, float, float, float, float]]:
        """Name, x, y, width and height of each node as the front end lays it out."""
        return [tuple(box) for box in self.page.evaluate(BOXES)]

    def failed(self) -> int | None:
        """The node at which the front end shows that the last run stopped."""
        return self.page.evaluate(FAILED)

    def upload(self, node_id: str | int, photo: Path) -> None:
        """Choose a file for a Load Image node."""
        with self.page.expect_file_chooser() as chooser:
            self.node(node_id).locator("label:has(input[type=file])").click()
        chooser.value.set_files(photo)

    def picture(self, node_id: str | int) -> str:
        """The address of the picture that a node shows, once it has really been loaded."""
        image = self.node(node_id).get_by_test_id("main-image")
        expect(image).to_be_visible()
        self.page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image.element_handle())
        return image.evaluate("image => image.src")

    def widget(self, node_id: str | int, name: str) -> Locator:
        """The field of a node's widget."""
        label = self.page.get_by_text(name, exact=True)
        return self.node(node_id).get_by_test_id("node-widget").filter(has=label).locator("input")

    def set(self, node_id: str | int, name: str, value: str | float) -> None:
        """Type a value into a widget."""
        field = self.widget(node_id, name)
        field.fill(str(value))  # numbers lie under an element to drag: a click would not reach them
        field.press("Enter")

    def run(self) -> None:
        """Press Run; the picture or the error is for the caller to wait for."""
        self.page.get_by_test_id("queue-button").click()

    def select(self, node_id: str | int) -> None:
        self.node(node_id).get_by_test_id(f"node-header-{node_id}").click()

    def help(self, node_id: str | int) -> Locator:
        """Open the help of a node by the button beside it."""
        self.select(node_id)
        self.page.get_by_test_id("info-button").click()
        return self.page.locator(".node-help-content")


@contextmanager
def open_canvas(client: Client, **context: Any) -> Iterator[Canvas]:
    """A browser on the front end of a server, for the length of a with block."""
    client.post("/settings", SETTINGS).raise_for_status()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try:
            page = browser.new_context(viewport=SIZE, **context).new_page()
            page.set_default_timeout(WAIT_SECONDS * 1000)
            expect.set_options(timeout=WAIT_SECONDS * 1000)
            page.goto(client.address, wait_until="domcontentloaded")
            page.wait_for_function("() => window.app?.graph && app.extensionManager?.workflow?.activeWorkflow")
            canvas = Canvas(page)
            canvas.settle()
            yield canvas
        finally:
            browser.close()
