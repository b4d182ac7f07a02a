"""The workflow files on the real server: what it accepts, what they draw."""

from __future__ import annotations

import copy
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from served import PHOTOS, PIXELS, WORKFLOWS, change, ids

from scripts.client import Interrupted
from scripts.environment import ROOT
from scripts.workflow import read_graph

TITLE_HEIGHT = 30
FILE_INPUTS = {"ckpt_name", "adapter_name", "clip_name", "subject_name", "lora_name", "control_net_name"}
NEEDING_FILES = [name for name, path in WORKFLOWS.items() if any(f'"{key}"' in path.read_text() for key in FILE_INPUTS)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_nodes_stand_apart_and_a_note_says_what_to_do(name):
    nodes = read_graph(WORKFLOWS[name])["nodes"]
    for a, b in combinations(nodes, 2):
        assert apart(a, b), (a["type"], b["type"])
    (note,) = (node for node in nodes if node["type"] == "MarkdownNote")
    assert any(word in note["widgets_values"][0] for word in ("models", "checkpoint", "assets"))


def apart(a: dict, b: dict) -> bool:
    (ax, ay), (aw, ah), (bx, by), (bw, bh) = a["pos"], a["size"], b["pos"], b["size"]
    beside = ax + aw <= bx or bx + bw <= ax
    return beside or ay + ah <= by - TITLE_HEIGHT or by + bh <= ay - TITLE_HEIGHT


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_widget_has_its_value(name):
    for node in read_graph(WORKFLOWS[name])["nodes"]:
        widgets = [socket["name"] for socket in node["inputs"] if "widget" in socket]
        controls = 1 if node["type"] in ("KSampler", "MarkdownNote") else 0
        assert len(node["widgets_values"]) == len(widgets) + controls, node["type"]


@pytest.mark.parametrize("name", NEEDING_FILES)
def test_the_server_misses_only_the_files(studio, name):
    """With names of files that nobody has, those are all that the server finds wrong, so nothing of it is queued.

    train_adapter names no file and would be queued; test_small_model.py runs it.
    """
    prompt = studio.prompt(name)
    missing = set()
    for node_id, node in prompt.items():
        for file_input in node["inputs"].keys() & FILE_INPUTS:
            node["inputs"][file_input] = "nobody has this.safetensors"
            missing.add((node_id, file_input, "value_not_in_list"))
    answer = studio.client.post("/prompt", {"prompt": prompt}).json()
    found = {
        (node_id, error["extra_info"]["input_name"], error["type"])
        for node_id, refused in answer["node_errors"].items()
        for error in refused["errors"]
    }
    assert found == missing
    assert "prompt_id" not in answer


def test_strength_changes_the_picture_and_nothing_lingers(studio, reference):
    prompt, first = reference
    assert first.shape == (PIXELS, PIXELS, 3)
    weaker = copy.deepcopy(prompt)
    change(weaker, "NestedAttentionApplySubject", strength=0.5)
    assert not np.array_equal(studio.draw(weaker), first)
    assert np.array_equal(studio.draw(prompt), first)


def test_an_interrupted_run_leaves_nothing_behind(studio, reference):
    prompt, first = reference
    long = copy.deepcopy(prompt)
    sampler = change(long, "KSampler", steps=50, seed=2)
    prompt_id = studio.client.queue(long)

    def stop(progress):
        if progress.node_id == sampler and progress.step:
            studio.client.interrupt()

    with pytest.raises(Interrupted):
        studio.client.wait(prompt_id, stop)
    assert np.array_equal(studio.draw(prompt), first)


def test_two_subjects_run(studio):
    prompt = studio.prompt("two_subjects_sdxl")
    both = studio.draw(prompt)
    change(prompt, "NestedAttentionApplySubject", 1, strength=0.0)
    assert not np.array_equal(studio.draw(prompt), both)


def test_a_saved_subject_draws_the_same_picture(studio, folder, reference):
    prompt, direct = reference
    save = studio.prompt("save_subject")
    studio.client.run(save)
    saved = folder / "nested_attention_subjects" / "anna_00001_.safetensors"
    assert saved.is_file()

    load = studio.prompt("load_subject")
    assert load[ids(load, "NestedAttentionLoadSubject")[0]]["inputs"]["subject_name"] == saved.name
    change(load, "NestedAttentionApplySubject", placeholder="<person>")
    change(load, "CLIPTextEncode", text=prompt[ids(prompt, "CLIPTextEncode")[0]]["inputs"]["text"])
    assert np.array_equal(studio.draw(load), direct)


def with_alpha(photo: Image.Image) -> Image.Image:
    """The photo, transparent towards the left."""
    made = photo.convert("RGBA")
    made.putalpha(Image.linear_gradient("L").rotate(90).resize(photo.size))
    return made


PICTURES = {
    "grey.png": lambda photo: photo.convert("L"),
    "alpha.png": with_alpha,
    "odd.jpg": lambda photo: photo.crop((3, 7, 134, 468)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_any_photo_is_encoded(studio, folder, name):
    path = folder / name
    PICTURES[name](Image.open(ROOT / "assets" / PHOTOS[0])).save(path)
    prompt = studio.prompt("save_subject")
    studio.client.upload_image(path)
    change(prompt, "LoadImage", image=name)
    change(prompt, "NestedAttentionSaveSubject", filename_prefix="any")
    (photo,) = ids(prompt, "LoadImage")
    (encode,) = ids(prompt, "NestedAttentionEncodeSubject")
    prompt["join"] = {"class_type": "JoinImageWithAlpha", "inputs": {"image": [photo, 0], "alpha": [photo, 1]}}
    prompt[encode]["inputs"]["image"] = ["join", 0]
    before = set((folder / "nested_attention_subjects").iterdir())
    studio.client.run(prompt)
    assert len(set((folder / "nested_attention_subjects").iterdir()) - before) == 1
