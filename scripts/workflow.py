"""Turns a workflow as the web front end saves it into the prompt that a server's /prompt takes.

The saved graph lists widget values by position; which input each belongs to is known from the server's
description of the node classes (/object_info).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEED_NAMES = {"seed", "noise_seed"}
SEED_CONTROLS = {"fixed", "increment", "decrement", "randomize", "increment-wrap"}
NOTES = {"Note", "MarkdownNote"}

Graph = dict[str, Any]
Node = dict[str, Any]


class WorkflowError(Exception):
    """The saved workflow does not fit the server's nodes, or is of a kind that none here is."""


def read_graph(path: Path) -> Graph:
    """Read a workflow file as the front end saves it."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    if "nodes" not in graph:
        raise WorkflowError(f"{path.name} has no list of nodes: it is not a workflow saved by the front end.")
    if graph.get("definitions", {}).get("subgraphs"):
        raise WorkflowError(f"{path.name} contains subgraphs; unpack them before saving.")
    return graph


def to_prompt(graph: Graph, object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The prompt of a saved graph in which every node runs: none muted, bypassed, or there to guide links alone."""
    sources = {link: [str(node), slot] for link, node, slot, *_ in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        if node["type"] not in object_info:
            raise WorkflowError(f"The server has no node {node['type']} (node {node['id']}).")
        if node.get("mode", 0):
            raise WorkflowError(f"Node {node['id']} ({node['type']}) is muted or bypassed.")
        info = object_info[node["type"]]
        linked = {s["name"]: sources[s["link"]] for s in node.get("inputs", []) if s.get("link") in sources}
        title = node.get("title") or info.get("display_name") or node["type"]
        inputs = {**_widget_inputs(node, info), **linked}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _widget_inputs(node: Node, info: dict[str, Any]) -> dict[str, Any]:
    inputs, rest = {}, list(node.get("widgets_values") or [])
    for name, spec in _widgets(info):
        options = spec[1] if len(spec) > 1 else {}
        if rest:
            inputs[name] = rest.pop(0)
        elif "default" in options:
            inputs[name] = options["default"]
        if rest and _has_seed_control(name, spec[0], options) and rest[0] in SEED_CONTROLS:
            rest.pop(0)
    return inputs


def widget_names(info: dict[str, Any]) -> list[str]:
    """A node class's inputs that have a widget, in the order in which their values are saved."""
    return [name for name, _ in _widgets(info)]


def _widgets(info: dict[str, Any]) -> Iterator[tuple[str, list]]:
    """The inputs that have a widget, in the order in which the front end draws and saves them."""
    for group in ("required", "optional"):
        specs = info["input"].get(group, {})
        for name in info.get("input_order", {}).get(group, specs):
            kind, options = specs[name][0], specs[name][1] if len(specs[name]) > 1 else {}
            if (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput"):
                yield name, specs[name]


def _has_seed_control(name: str, kind: Any, options: dict[str, Any]) -> bool:
    return bool(options.get("control_after_generate")) or (kind == "INT" and name in SEED_NAMES)
