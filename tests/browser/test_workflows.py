"""Workflow files dropped on the canvas."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from playwright.sync_api import expect
from served import WORKFLOWS

from scripts.workflow import read_graph

MISSING = "missing-node-card"


@pytest.fixture(scope="module")
def names(server):
    """Display name of each class of nodes."""
    return {kind: info["display_name"] for kind, info in server.object_info().items()}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_node_opens_under_its_name(canvas, names, name):
    canvas.open(WORKFLOWS[name])
    assert canvas.unknown_types() == []
    expect(canvas.page.get_by_test_id(MISSING)).to_have_count(0)
    for node in read_graph(WORKFLOWS[name])["nodes"]:
        title = node.get("title") or names[node["type"]]
        expect(canvas.node(node["id"]).get_by_test_id("node-title").first).to_have_text(title)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_nodes_stand_apart_as_they_are_drawn(canvas, name):
    canvas.open(WORKFLOWS[name])
    boxes = canvas.boxes()
    assert len(boxes) == len(read_graph(WORKFLOWS[name])["nodes"])
    assert [(a[0], b[0]) for a, b in combinations(boxes, 2) if overlap(a, b)] == []


def overlap(a: tuple, b: tuple) -> bool:
    (_, ax, ay, aw, ah), (_, bx, by, bw, bh) = a, b
    return ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah


def test_a_node_that_is_missing_would_be_noticed(canvas, tmp_path):
    graph = read_graph(WORKFLOWS["quickstart"])
    graph["nodes"][0]["type"] = "NobodyHasThis"
    path = tmp_path / "missing.json"
    path.write_text(json.dumps(graph))
    canvas.open(path)
    assert canvas.unknown_types() == ["NobodyHasThis"]
