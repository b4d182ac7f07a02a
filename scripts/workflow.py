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
NOT_RUN = {"Note", "MarkdownNote", "PrimitiveNode", "Reroute"}
MUTED, BYPASSED = 2, 4

Graph = dict[str, Any]
Node = dict[str, Any]


class WorkflowError(Exception):
    """The saved workflow does not fit the server's nodes."""


def read_graph(path: Path) -> Graph:
    """Read a workflow file as the front end saves it."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    if "nodes" not in graph:
        raise WorkflowError(f"{path.name} has no list of nodes: it is not a workflow saved by the front end.")
    if graph.get("definitions", {}).get("subgraphs"):
        raise WorkflowError(f"{path.name} contains subgraphs; unpack them before saving.")
    return graph


def to_prompt(graph: Graph, object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The prompt of a saved graph: muted nodes and what hangs on them alone left out, bypassed ones bridged."""
    wiring = _Wiring(graph)
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in NOT_RUN or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise WorkflowError(f"The server has no node {node['type']} (node {node['id']}).")
        inputs = {**_widget_inputs(node, object_info[node["type"]]), **wiring.inputs(node)}
        title = node.get("title") or object_info[node["type"]].get("display_name") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


class _Wiring:
    """Follows links backwards to the node that really yields a value."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = {node["id"]: node for node in graph["nodes"]}
        self.links = dict(map(_link, graph.get("links", [])))

    def inputs(self, node: Node) -> dict[str, Any]:
        """The values of a node's linked inputs."""
        found = {socket["name"]: self._value(socket.get("link")) for socket in node.get("inputs", [])}
        return {name: value for name, value in found.items() if value is not None}

    def _value(self, link: int | None) -> Any:
        """What arrives over a link: [node id, output index], a primitive's value, or None."""
        if link is None or link not in self.links:
            return None
        source, slot = self.links[link]
        node = self.nodes[source]
        if node["type"] == "PrimitiveNode":
            return node["widgets_values"][0]
        if node["type"] == "Reroute":
            return self._value(node["inputs"][0].get("link"))
        if node.get("mode", 0) == MUTED:
            return None
        if node.get("mode", 0) == BYPASSED:
            return self._value(_bridge(node, slot))
        return [str(source), slot]


def _link(link: list | dict) -> tuple[int, tuple[int, int]]:
    if isinstance(link, dict):
        return link["id"], (link["origin_id"], link["origin_slot"])
    return link[0], (link[1], link[2])


def _bridge(node: Node, slot: int) -> int | None:
    """The link into a bypassed node that takes the place of its output: same place first, else same type."""
    kind = node["outputs"][slot]["type"]
    sockets = node.get("inputs", [])
    candidates = [*sockets[slot : slot + 1], *sockets]
    return next((socket.get("link") for socket in candidates if socket["type"] == kind), None)


def _widget_inputs(node: Node, info: dict[str, Any]) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return {name: values[name] for name, _ in _widgets(info) if name in values}
    inputs, rest = {}, list(values)
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
