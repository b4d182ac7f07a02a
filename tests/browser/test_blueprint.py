"""The blueprint, taken from the front end's node library."""

from __future__ import annotations

INNER = "() => app.graph.nodes.filter(n => n.title === 'Personalize').flatMap(n => n.subgraph.nodes.map(m => m.type))"


def test_personalize_is_in_the_library_and_knows_its_nodes(canvas):
    page = canvas.page
    page.keyboard.press("n")
    page.get_by_placeholder("Search").last.fill("Personalize")
    page.get_by_text("Personalize", exact=True).first.click()
    page.mouse.click(700, 650)  # where it shall be
    page.wait_for_function(f"() => ({INNER})().length")
    assert page.evaluate(INNER) == [
        f"NestedAttention{name}" for name in ("LoadAdapter", "EncodeSubject", "ApplySubject")
    ]
    page.keyboard.press("n")
