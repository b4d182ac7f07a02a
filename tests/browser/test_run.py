"""What a user does with the quickstart workflow: photo, Run, another value, Run again, a mistake."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import expect
from served import WORKFLOWS, pixels_of, with_few_steps

from scripts.environment import ROOT
from scripts.workflow import read_graph

GRAPH = read_graph(WORKFLOWS["quickstart"])
NODES = GRAPH["nodes"]


def first(kind: str) -> int:
    return next(node["id"] for node in NODES if node["type"] == kind)


PHOTO, APPLY, SAVE = first("LoadImage"), first("NestedAttentionApplySubject"), first("SaveImage")


@pytest.fixture
def quickstart(canvas, tmp_path):
    """The workflow with few steps, opened afresh."""
    canvas.open(with_few_steps(WORKFLOWS["quickstart"], tmp_path))
    return canvas


def shown(canvas, node_id: int) -> np.ndarray:
    return pixels_of(canvas.page.request.get(canvas.picture(node_id)).body())


def test_a_photo_uploads(quickstart, tmp_path):
    photo = tmp_path / "somebody else.png"
    shutil.copy(ROOT / "assets" / "studio_person_2.png", photo)
    quickstart.upload(PHOTO, photo)
    expect(quickstart.node(PHOTO)).to_contain_text(photo.stem)
    expect(quickstart.node(PHOTO).get_by_test_id("main-image")).to_have_attribute("src", re.compile("somebody"))
    assert np.array_equal(shown(quickstart, PHOTO), pixels_of(photo.read_bytes()))


def test_run_shows_the_picture_and_strength_changes_it(quickstart):
    quickstart.run()
    with_subject, address = shown(quickstart, SAVE), quickstart.picture(SAVE)
    quickstart.set(APPLY, "strength", 0)
    quickstart.run()
    expect(quickstart.node(SAVE).get_by_test_id("main-image")).not_to_have_js_property("src", address)
    assert not np.array_equal(shown(quickstart, SAVE), with_subject)


def test_a_mistake_shows_at_its_node(quickstart):
    quickstart.set(APPLY, "class_word", "fire truck")
    quickstart.run()
    page = quickstart.page
    page.get_by_test_id("error-overlay-see-errors").click()
    expect(page.get_by_text("'fire truck' is 2 ('fire' + 'truck')").first).to_be_visible()
    assert quickstart.failed() == APPLY


def test_prompt_info_is_read_on_the_node(canvas, tmp_path):
    nodes = [
        {
            "id": 1,
            "type": "NestedAttentionLoadStudio",
            "pos": [0, 0],
            "outputs": [{"name": name, "type": name} for name in ("MODEL", "CLIP", "VAE", "CLIP_VISION")],
        },
        {
            "id": 2,
            "type": "NestedAttentionPromptInfo",
            "pos": [500, 0],
            "inputs": [{"name": "clip", "type": "CLIP", "link": 1}],
            "widgets_values": ["a happy person"],
        },
    ]
    path = tmp_path / "info.json"
    path.write_text(json.dumps({"version": 0.4, "nodes": nodes, "links": [[1, 1, 1, 2, 0, "CLIP"]]}))
    canvas.open(path)
    canvas.run()
    expect(canvas.node(2)).to_contain_text("1:a 2:happy 3:person")
    canvas.page.wait_for_timeout(2000)  # nor does it go when the run has ended
    expect(canvas.node(2)).to_contain_text("1:a 2:happy 3:person")


def test_a_warning_stays_until_its_node_runs_again(quickstart):
    """It is shown as it is written, and is no value of the node's: none of it is saved."""
    saved = quickstart.page.evaluate("id => app.graph.getNodeById(id).serialize().widgets_values", APPLY)
    quickstart.set(APPLY, "end_percent", 0)
    quickstart.run()
    warning = "<person> begins at 0 of the sampling and ends at 0"
    expect(quickstart.node(APPLY)).to_contain_text(warning)
    quickstart.picture(SAVE)
    quickstart.page.wait_for_timeout(2000)
    expect(quickstart.node(APPLY)).to_contain_text(warning)
    now = quickstart.page.evaluate("id => app.graph.getNodeById(id).serialize().widgets_values", APPLY)
    assert len(now) == len(saved) and warning not in str(now)
    quickstart.set(APPLY, "end_percent", 1)
    quickstart.run()
    expect(quickstart.node(APPLY)).to_contain_text("<person> stands in the prompt.")
    expect(quickstart.node(APPLY)).not_to_contain_text(warning)


def test_a_warning_of_one_sampler_outlasts_what_the_next_says(quickstart):
    """Of three prompts one misses the word."""
    texts = [node["id"] for node in NODES if "<person>" in str(node.get("widgets_values")) and node["id"] != APPLY]
    change = "id => { app.graph.getNodeById(id).widgets.find(w => w.name === 'text').value = 'a happy person' }"
    quickstart.page.evaluate(change, texts[0])
    quickstart.run()
    for node in NODES:
        if node["type"] == "SaveImage":
            quickstart.picture(node["id"])
    quickstart.page.wait_for_timeout(2000)
    expect(quickstart.node(APPLY)).to_contain_text("No prompt holds <person>")


def test_a_warning_is_seen_from_outside_of_a_subgraph(quickstart):
    page = quickstart.page
    quickstart.set(APPLY, "end_percent", 0)
    page.evaluate("id => app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]))", APPLY)
    quickstart.run()
    for words in ("New Subgraph / Apply Subject", "<person> begins at 0 of the sampling and ends at 0"):
        expect(page.get_by_text(words).first).to_be_visible()


def test_a_training_says_what_it_did(canvas, tmp_path):
    """Also that nothing was trained, where a changed seed does not make it another training."""
    nodes = read_graph(WORKFLOWS["train_adapter"])["nodes"]
    train, save = (
        next(n["id"] for n in nodes if n["type"] == f"NestedAttention{kind}") for kind in ("Train", "SaveAdapter")
    )
    canvas.open(WORKFLOWS["train_adapter"])
    for name, value in {"name": tmp_path.name, "steps": 2, "preview_every": 0}.items():
        canvas.set(train, name, value)
    canvas.run()
    expect(canvas.node(train)).to_contain_text("2 steps, 2 in all. The run is in")
    expect(canvas.node(save)).to_contain_text("Saved as my_pet_00001_.safetensors")
    canvas.set(train, "seed", 7)
    canvas.run()
    expect(canvas.node(train)).to_contain_text("had all its steps: 2.")
