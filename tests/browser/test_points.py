"""Points of Inspect Nested Attention, picked by clicks in the picture that it inspected."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect
from served import WORKFLOWS, with_few_steps

from scripts.workflow import read_graph

NODE = next(n["id"] for n in read_graph(WORKFLOWS["inspect"])["nodes"] if n["type"] == "NestedAttentionInspect")


@pytest.fixture
def inspect(canvas, tmp_path):
    """The workflow with few steps, opened afresh."""
    canvas.open(with_few_steps(WORKFLOWS["inspect"], tmp_path))
    return canvas


@pytest.fixture
def inspected(inspect):
    """After a run."""
    inspect.run()
    inspect.picture(NODE)
    return inspect


def pick(canvas):
    canvas.node(NODE).get_by_role("button", name="pick points").click()
    return canvas.page.locator("dialog.nested-attention-points")


def test_before_a_run_it_says_what_to_do(inspect):
    assert pick(inspect).count() == 0
    seen = inspect.page.locator(":not([role=status] *)")  # newer front ends write it once more, for screen readers
    expect(seen.and_(inspect.page.get_by_text("Queue the workflow once"))).to_be_visible()


def test_clicks_become_points(inspected):
    dialog = pick(inspected)
    picture, marks = dialog.locator("img"), dialog.locator("div button")
    expect(marks).to_have_count(3)
    inspected.page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())
    dialog.get_by_text("Clear").click()
    expect(marks).to_have_count(0)
    box = picture.bounding_box()
    for x, y in ((0.25, 0.75), (0.5, 0.1)):
        picture.click(position={"x": x * box["width"], "y": y * box["height"]})
    marks.first.click()  # away with it
    expect(marks).to_have_count(1)
    dialog.get_by_text("Done").click()
    x, y = map(float, inspected.widget(NODE, "points").input_value().split(","))
    assert (x, y) == (pytest.approx(0.5, abs=0.01), pytest.approx(0.1, abs=0.01))


def test_keys_are_the_pickers(inspected):
    """Undo takes points back and changes no graph behind it; Escape closes it and changes nothing."""
    points, before = inspected.widget(NODE, "points"), inspected.widget(NODE, "points").input_value()
    inspected.page.evaluate("id => { window.app.graph.getNodeById(id).mine = true }", NODE)
    inspected.set(NODE, "points", "0.1，0.2")  # a Chinese keyboard's comma
    dialog = pick(inspected)
    expect(dialog.locator("div button")).to_have_count(1)
    expect(dialog.locator("img")).to_be_visible()
    dialog.locator("img").click(position={"x": 20, "y": 20})
    inspected.page.keyboard.press("Control+z")
    dialog.locator("img").click(position={"x": 40, "y": 40})
    dialog.locator("div button").last.click()
    inspected.page.keyboard.press("Control+z")
    dialog.get_by_text("Click to add").click()  # what is no field takes the focus
    inspected.page.keyboard.press("Control+z")
    inspected.page.keyboard.press("Tab")
    inspected.page.keyboard.press("Control+z")
    inspected.settle()
    assert inspected.page.evaluate("id => window.app.graph.getNodeById(id).mine", NODE)
    inspected.page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert points.input_value() == "0.1，0.2" != before
    pick(inspected).locator("img").click(position={"x": 20, "y": 20})
    inspected.page.keyboard.press("Control+z")
    dialog.get_by_text("Done").click()
    assert points.input_value() == "0.1,0.2"
    inspected.page.keyboard.press("Control+z")  # which is the graph's again
    inspected.page.wait_for_function("id => !window.app.graph.getNodeById(id).mine", arg=NODE)


def test_points_can_be_picked_after_the_graph_was_made_anew(inspected):
    """As undo and a change of the tab do."""
    inspected.page.evaluate("() => window.app.loadGraphData(window.app.graph.serialize(), false)")
    dialog = pick(inspected)
    expect(dialog.locator("img")).to_be_visible()
    dialog.get_by_text("Done").click()
