"""A subgraph blueprint as ComfyUI's front end reads it: does it fit the nodes, and what does it do?"""

from __future__ import annotations

from typing import Any

from served import ids

from scripts.client import Prompt
from scripts.workflow import to_prompt, widget_names

INPUT, OUTPUT = -10, -20  # the ids that stand for the subgraph's own sockets
OFFSET = 1000  # away from the ids of the prompt around it

Blueprint = dict[str, Any]
Info = dict[str, Any]


def definition(blueprint: Blueprint) -> dict[str, Any]:
    (node,), (found,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == found["id"]
    return found


def problems(blueprint: Blueprint, info: Info) -> list[str]:
    """Where sockets, widgets and links disagree with the nodes' schemas or with each other."""
    inside, (outside,) = definition(blueprint), blueprint["nodes"]
    found = [text for node in inside["nodes"] for text in _misfits(node, info[node["type"]])]
    for kind in ("inputs", "outputs"):
        if [(s["name"], s["type"]) for s in inside[kind]] != [(s["name"], s["type"]) for s in outside[kind]]:
            found.append(f"the {kind} outside are not those inside")
    found += [f"link {link['id']} does not fit" for link in inside["links"] if not _fits(link, inside)]
    promoted = [[str(link["target_id"]), _ends(link, inside)[1]["name"]] for link in _from(inside, INPUT)]
    widgets = [pair for pair, socket in zip(promoted, outside["inputs"], strict=True) if "widget" in socket]
    if outside["properties"]["proxyWidgets"] != widgets:
        found.append("the widgets outside are not those that the inputs lead to")
    return found


def instead_of_apply(blueprint: Blueprint, prompt: Prompt, info: Info) -> Prompt:
    """The prompt with the blueprint, its widgets as saved, in place of the first Apply Subject and what feeds it."""
    apply = ids(prompt, "NestedAttentionApplySubject")[0]
    outer = prompt[apply]["inputs"]
    sources = {**prompt[outer["subject"][0]]["inputs"], **outer}
    inside = definition(blueprint)
    inner = _inner_prompt(inside, info)
    for link in _from(inside, INPUT):
        socket, target = _ends(link, inside)
        if isinstance(sources.get(socket["name"]), list):
            inner[str(link["target_id"] + OFFSET)]["inputs"][target["name"]] = sources[socket["name"]]
    results = {
        link["target_slot"]: [str(link["origin_id"] + OFFSET), link["origin_slot"]]
        for link in inside["links"]
        if link["target_id"] == OUTPUT
    }
    rest = {node_id: _relinked(node, apply, results) for node_id, node in prompt.items() if node_id != apply}
    return {**rest, **inner}


def _inner_prompt(inside: dict[str, Any], info: Info) -> Prompt:
    inner = (link for link in inside["links"] if link["origin_id"] != INPUT and link["target_id"] != OUTPUT)
    links = [[link["id"], link["origin_id"], link["origin_slot"]] for link in inner]
    prompt = to_prompt({"nodes": inside["nodes"], "links": links}, info)
    renamed = {}
    for node_id, node in prompt.items():
        inputs = {
            name: [str(int(value[0]) + OFFSET), value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        renamed[str(int(node_id) + OFFSET)] = {**node, "inputs": inputs}
    return renamed


def _relinked(node: dict[str, Any], old: str, results: dict[int, list]) -> dict[str, Any]:
    inputs = {
        name: results[value[1]] if isinstance(value, list) and value[0] == old else value
        for name, value in node["inputs"].items()
    }
    return {**node, "inputs": inputs}


def _misfits(node: dict[str, Any], info: Info) -> list[str]:
    order = [name for group in ("required", "optional") for name in info["input_order"].get(group, [])]
    widgets = widget_names(info)
    found = []
    if [socket["name"] for socket in node["inputs"]] != order:
        found.append(f"{node['type']} has other inputs")
    if [socket["name"] for socket in node["inputs"] if "widget" in socket] != widgets:
        found.append(f"{node['type']} has its widgets in another order")
    if len(node["widgets_values"]) != len(widgets):
        found.append(f"{node['type']} has other widgets")
    if [socket["type"] for socket in node["outputs"]] != info["output"]:
        found.append(f"{node['type']} has other outputs")
    return found


def _from(inside: dict[str, Any], origin: int) -> list[dict[str, Any]]:
    links = [link for link in inside["links"] if link["origin_id"] == origin]
    return sorted(links, key=lambda link: link["origin_slot"])


def _ends(link: dict[str, Any], inside: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sockets at both ends of a link."""
    nodes = {node["id"]: node for node in inside["nodes"]}
    origin = inside["inputs"] if link["origin_id"] == INPUT else nodes[link["origin_id"]]["outputs"]
    target = inside["outputs"] if link["target_id"] == OUTPUT else nodes[link["target_id"]]["inputs"]
    return origin[link["origin_slot"]], target[link["target_slot"]]


def _fits(link: dict[str, Any], inside: dict[str, Any]) -> bool:
    """Both ends have the link's type and know of it."""
    origin, target = _ends(link, inside)
    known = link["id"] in (origin.get("links") or origin.get("linkIds") or [])
    known &= link["id"] == target.get("link") or link["id"] in target.get("linkIds", [])
    return known and origin["type"] == target["type"] == link["type"]
