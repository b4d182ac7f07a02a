"""What a shared workflow must say of this pack."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json")])
NAME = re.search(r'^name = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_nodes_name_the_pack_by_which_the_manager_finds_it(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    inside = [node for part in graph.get("definitions", {}).get("subgraphs", []) for node in part["nodes"]]
    ours = [node for node in [*graph["nodes"], *inside] if node["type"].startswith("NestedAttention")]
    assert ours and {node["properties"].get("cnr_id") for node in ours} == {NAME}


def test_the_template_gallery_has_a_picture_of_each():
    pictures = {path.stem for path in (ROOT / "workflows").glob("*.jpg")}
    assert {path.stem for path in (ROOT / "workflows").glob("*.json")} == pictures
