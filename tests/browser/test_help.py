"""The help of our nodes in the front end's own panel."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect
from served import WORKFLOWS

from scripts.environment import ROOT
from scripts.workflow import read_graph

NODES = {node["type"]: node["id"] for node in read_graph(WORKFLOWS["inspect"])["nodes"]}
OURS = sorted(kind for kind in NODES if kind.startswith("NestedAttention"))


@pytest.fixture(scope="module")
def opened(canvas):
    canvas.open(WORKFLOWS["inspect"])
    return canvas


@pytest.mark.parametrize("kind", OURS)
def test_help_shows_our_page(opened, kind):
    title, paragraph, *_ = (ROOT / "web" / "docs" / f"{kind}.md").read_text(encoding="utf-8").split("\n\n")
    help = opened.help(NODES[kind])
    expect(help).to_contain_text(title.removeprefix("# "))
    expect(help).to_contain_text(plain(paragraph))
    picture = help.locator(f"img[src$='{kind}.jpg']")
    opened.page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())


def plain(markdown: str) -> str:
    """A paragraph as it reads on the page."""
    return re.sub(r"[*`]|\s+", lambda mark: " " if mark[0].isspace() else "", markdown).strip()
