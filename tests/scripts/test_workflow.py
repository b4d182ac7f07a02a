"""Saved graphs become the prompts that the front end would send."""

import pytest

from scripts.workflow import WorkflowError, to_prompt

INFO = {
    "Load": {"input": {"required": {"name": [["a.png", "b.png"], {"image_upload": True}]}}, "display_name": "Load it"},
    "Noise": {
        "input": {
            "required": {
                "image": ["IMAGE", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "scale": ["FLOAT", {"default": 1.0}],
                "mode": ["COMBO", {"options": ["x", "y"]}],
            },
            "optional": {"text": ["STRING", {"forceInput": True}], "late": ["BOOLEAN", {"default": True}]},
        },
        "input_order": {"required": ["image", "seed", "scale", "mode"], "optional": ["text", "late"]},
        "display_name": "Noise",
    },
    "Save": {"input": {"required": {"images": ["IMAGE", {}]}}, "display_name": "Save"},
}


def node(node_id, kind, values=(), mode=0, title=None, **inputs):
    sockets = [{"name": name, "type": "IMAGE", "link": link} for name, link in inputs.items()]
    made = {"id": node_id, "type": kind, "mode": mode, "inputs": sockets, "widgets_values": list(values)}
    made["outputs"] = [{"name": "IMAGE", "type": "IMAGE"}]
    return {**made, "title": title} if title else made


def chain(middle, links=((1, 1, 0, 2, 0, "IMAGE"), (2, 2, 0, 3, 0, "IMAGE"))):
    nodes = [node(1, "Load", ["b.png", "image"]), middle, node(3, "Save", images=2)]
    return {"nodes": nodes, "links": [list(link) for link in links]}


def test_widget_values_go_by_position_and_the_seed_control_is_skipped():
    prompt = to_prompt(chain(node(2, "Noise", [7, "randomize", 0.5, "y", False], image=1)), INFO)
    assert prompt["1"] == {"class_type": "Load", "inputs": {"name": "b.png"}, "_meta": {"title": "Load it"}}
    assert prompt["2"]["inputs"] == {"image": ["1", 0], "seed": 7, "scale": 0.5, "mode": "y", "late": False}
    assert prompt["3"]["inputs"] == {"images": ["2", 0]}


def test_inputs_newer_than_the_file_take_their_defaults():
    prompt = to_prompt(chain(node(2, "Noise", [7, "fixed", 0.5, "y"], image=1)), INFO)
    assert prompt["2"]["inputs"]["late"] is True


def test_a_linked_widget_keeps_its_place_among_the_values():
    middle = node(2, "Noise", [7, "fixed", 0.5, "y"], image=1, seed=3)
    graph = chain(middle, [(1, 1, 0, 2, 0, "IMAGE"), (2, 2, 0, 3, 0, "IMAGE"), (3, 8, 0, 2, 1, "INT")])
    graph["nodes"] += [node(8, "Load", ["a.png"]), node(9, "MarkdownNote", ["read me"])]
    prompt = to_prompt(graph, INFO)
    assert set(prompt) == {"1", "2", "3", "8"}
    assert prompt["2"]["inputs"] == {"image": ["1", 0], "seed": ["8", 0], "scale": 0.5, "mode": "y", "late": True}


@pytest.mark.parametrize("mode", [2, 4])
def test_what_the_front_end_would_leave_out_is_refused(mode):
    with pytest.raises(WorkflowError, match="Node 2 .Noise. is muted or bypassed"):
        to_prompt(chain(node(2, "Noise", [7, "fixed", 0.5, "y"], mode=mode, image=1)), INFO)


def test_titles_are_kept_and_unknown_nodes_named():
    graph = chain(node(2, "Noise", [7, "fixed", 0.5, "y"], title="Mine", image=1))
    assert to_prompt(graph, INFO)["2"]["_meta"]["title"] == "Mine"
    with pytest.raises(WorkflowError, match="no node Noise"):
        to_prompt(graph, {name: INFO[name] for name in ("Load", "Save")})
