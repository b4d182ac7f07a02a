"""The views of a run as numbers, against plain loops; records within their limit; pictures of the right size."""

import pytest
import torch
from reference import regularised_lookup

from nested_attention.attention import NestedToken
from nested_attention.inspection import drawing, figures
from nested_attention.inspection.record import Record, chosen_steps, is_wanted
from nested_attention.inspection.views import (
    Lookup,
    average,
    image_attention,
    nested_attention,
    nested_values,
    parse_points,
    patch_maps,
    point_weights,
    positions,
    principal_axes,
    principal_colors,
    shares,
    top_tokens,
)
from nested_attention.resampler import Resampler

H, D, M = 3, 8, 12
SIZE = (4, 6)


def lookup(seed=0, size=SIZE, **settings):
    make = torch.Generator().manual_seed(seed)
    n = size[0] * size[1]
    q, keys, values, textual = (torch.randn(1, H, x, D, generator=make) for x in (n, M, M, 1))
    return Lookup(f"output 0.0 {size[0]}x{size[1]}", size, q, textual, NestedToken((0,), keys, values, **settings))


@pytest.mark.parametrize("norm", ["rescale", "clamp", "off"])
def test_values_are_the_equations(norm):
    seen = lookup(norm=norm, norm_factor=1.1)
    values = nested_values(seen)
    for i in range(SIZE[0] * SIZE[1]):
        expected = regularised_lookup(seen.q[0, :, i], seen.token)(seen.textual[0, :, 0])
        torch.testing.assert_close(values[i], expected.flatten(), rtol=1e-4, atol=1e-5)


def test_stems_are_the_nested_softmax():
    seen = lookup()
    weights = nested_attention(seen, [5, 17])
    for row, i in zip(weights, (5, 17), strict=True):
        heads = [(seen.token.keys[0, h] @ seen.q[0, h, i] / D**0.5).softmax(0) for h in range(H)]
        torch.testing.assert_close(row, sum(heads) / H)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    mass, token = top_tokens(weights)
    assert token[0].tolist() == weights[0].argsort(descending=True)[:2].tolist()
    torch.testing.assert_close(mass[0], weights[0].sort(descending=True).values[:2])


def test_points_of_layers_of_different_sizes():
    big, small = lookup(size=(8, 12)), lookup(1)
    points = [(0.0, 0.0), (0.5, 0.25), (1.0, 1.0)]
    assert positions(points, SIZE) == [0, 9, 23] and positions(points, (8, 12)) == [0, 30, 95]
    expected = (nested_attention(big, [0, 30, 95]) + nested_attention(small, [0, 9, 23])) / 2
    torch.testing.assert_close(point_weights([big, small], points), expected)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_principal_axes_are_those_of_the_covariance(shape):
    x = torch.randn(shape, dtype=torch.float64) * torch.linspace(1, 3, shape[1], dtype=torch.float64)
    x -= x.mean(0)
    axes, kept = principal_axes(x)
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close((axes * v[:3].T).sum(0).abs(), torch.ones(3, dtype=torch.float64))
    assert kept == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()))


def test_colors():
    """Places of one value have one colour, and a constant that is one of the values has that value's."""
    kinds = torch.randn(4, 30)
    kind = torch.arange(4).repeat(10)
    colors, constant, kept = principal_colors(kinds[kind], kinds[2])
    assert colors.min() >= 0 and colors.max() <= 1 and kept == pytest.approx(1)
    torch.testing.assert_close(colors[:4].repeat(10, 1), colors)
    torch.testing.assert_close(constant, colors[2])
    assert len({tuple(c) for c in colors[:4].mul(50).round().tolist()}) == 4


def test_spread_is_cut_off_at_both_ends():
    """Of 101 values on a line, a tenth at either end has the outermost colour; between, it grows evenly."""
    line = torch.arange(101.0)[:, None] * torch.tensor([2.0, 1.0, 0.0])
    colors, _, _ = principal_colors(line, line[0], spread=0.1)
    expected = ((torch.arange(101.0) - 10) / 80).clamp(0, 1)
    torch.testing.assert_close(colors[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_equal_values_have_one_color():
    colors, _, _ = principal_colors(torch.ones(10, 30), torch.zeros(30))
    assert (colors == colors[0]).all()


def test_what_the_q_former_looked_at():
    """Against the layers' own probabilities, and a photo in which one patch draws all attention."""
    settings = {"image_dim": 10, "dim": 12, "depth": 2, "heads": 3, "dim_head": 4, "queries": 5, "output_dim": 7}
    resampler = Resampler(**settings, ff_mult=4)
    features, maps = torch.randn(1, 17, 10), []
    expected = resampler(features, observe=maps.append)
    tokens, attention = image_attention(resampler, features)
    assert torch.equal(tokens, expected) and attention.shape == (1, 5, 17)
    torch.testing.assert_close(attention, torch.stack([m.mean(1) for m in maps]).mean(0))
    patches = patch_maps(attention)
    assert patches.shape == (1, 5, 4, 4) and torch.equal(patches.flatten(2), attention[..., 1:])
    assert patch_maps(torch.rand(16)).shape == (4, 4)
    with pytest.raises(ValueError, match="no square"):
        patch_maps(torch.rand(19))


def test_shares_and_averages():
    a, b = torch.full((2, 2), 0.3), torch.full((4, 4), 0.1)
    torch.testing.assert_close(shares([a, b]), torch.stack([torch.full((4, 4), 0.75), torch.full((4, 4), 0.25)]))
    assert shares([a * 0, b * 0]).isfinite().all()
    torch.testing.assert_close(average([a, b]), torch.full((4, 4), 0.2))


def test_steps_and_layers_by_name():
    assert chosen_steps("all", 4) == {1, 2, 3, 4} == chosen_steps("", 4)
    assert chosen_steps("1-2, 9-20,last", 10) == {1, 2, 9, 10} and chosen_steps("30", 20) == set()
    for wrong in ("first", "0", "3-1"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no step"):
            chosen_steps(wrong, 4)
    assert chosen_steps("1-2，9－20", 10) == {1, 2, 9, 10} and is_wanted("output 1.0 32x32", "input，32x32")
    assert is_wanted("output 1.0 32x32", "input, 32x32") and not is_wanted("output 1.0 32x32", "64x64")


def test_points_in_words():
    assert parse_points(" 0.4,0.3; 1, 0 ;") == [(0.4, 0.3), (1.0, 0.0)] == parse_points("0.4，0.3；1，0")
    for wrong in ("0.4", "1.2,0", "a,b", "nan,0"):
        with pytest.raises(ValueError, match="is no point"):
            parse_points(f"0.5,0.5; {wrong}")
    with pytest.raises(ValueError, match="33 points; 32 at most"):
        parse_points("0.5,0.5;" * 33)


def test_maps_of_one_step_are_averaged():
    record = Record(10**6)
    for value in (1.0, 2.0, 6.0):
        record.add_map(1, 0, 0, torch.full((2, 2), value))
    torch.testing.assert_close(record.maps[1, 0, 0], torch.full((2, 2), 3.0))


def test_maps_of_a_layer_that_shrinks_in_between():
    record = Record(10**6)
    for side in (8, 4):
        record.add_map(1, 0, 0, torch.full((side, side), float(side)))
    torch.testing.assert_close(record.maps[1, 0, 0], torch.full((8, 8), 6.0))


def test_each_prompt_keeps_its_queries():
    """Of a subject the last that was asked beside it, though other prompts or steps follow without it."""
    record = Record(10**6)
    for value, subjects in enumerate([(0, 1), (0,), (2,)]):
        record.add_queries(0, (2, 2), torch.full((4, 6), float(value)), 2, {s: torch.zeros(6) for s in subjects})
    assert [record.asked(0, subject).q.unique().item() for subject in (0, 1, 2)] == [1, 0, 2]
    assert record.asked(0, 3) is record.asked(1, 0) is None and record.used == held(record)


def held(record):
    queries = [x for each in record.queries.values() for x in (each.q, *each.textual.values())]
    return sum(x.numel() * x.element_size() for x in (*record.maps.values(), *queries))


def test_a_record_keeps_its_limit():
    """Maps before queries: they take the room of queries when there is no other, and are counted when lost.

    A layer whose queries were left out stays out, though it would fit again.
    """
    record = Record(limit=10_000)
    for step in range(30):
        for layer in range(4):
            record.add_map(step, layer, 0, torch.rand(8, 8))
            width = (10, 10, 10, 8)[layer]
            record.add_queries(layer, (8, 8), torch.rand(64, width), 2, {0: torch.rand(width)})
            assert record.used == held(record) <= record.limit
        assert record.left_out == {0, 1, 2, 3} - {layer for layer, _ in record.queries}
        if step == 0:
            assert record.left_out == {3} and not record.lost
    assert len(record.maps) == 39 and record.lost == 81 and not record.queries


def test_a_record_keeps_copies():
    record, q = Record(10**6), torch.zeros(4, 6)
    record.add_queries(0, (2, 2), q, 2, {0: q[0]})
    record.add_map(1, 0, 0, q[:, 0].view(2, 2))
    q += 1
    asked = record.asked(0, 0)
    assert not asked.q.any() and not asked.textual[0].any() and not record.maps[1, 0, 0].any()
    assert asked.q.untyped_storage().nbytes() == 4 * 6 * 4


PICTURE = torch.rand(48, 32, 3)
PHOTO = torch.rand(16, 16, 3)


def of_token(token):
    return PHOTO, torch.eye(M)[token].view(3, 4)


SECTIONS = {
    "overview": lambda: figures.overview(PHOTO, PICTURE, [(0.2, 0.3), (1.0, 1.0)]),
    "attention": lambda: figures.attention(PICTURE, "<a>", [("steps", [(str(i), torch.rand(4, 6)) for i in range(8)])]),
    "values": lambda: figures.values(PICTURE, [lookup(), lookup(1, (8, 12))]),
    "points": lambda: figures.at_points(torch.rand(3, M), 2, of_token),
    "points without photo": lambda: figures.at_points(torch.rand(3, M), 2),
    "photo": lambda: figures.photo(torch.rand(3, M), of_token),
    "owners": lambda: figures.owners(PICTURE, ["<a>", "<b>"], [torch.rand(4, 6), torch.rand(8, 12)]),
    "no attention at all": lambda: figures.attention(PICTURE, "<a>", [("steps", [("1", torch.zeros(4, 6))])]),
    "one nested token": lambda: figures.at_points(torch.ones(1, 1), 1, of_token),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_drawn(section):
    image = SECTIONS[section]()
    x = figures.sheet("A title", "a note", [image])
    assert x.shape[0] == 1 and x.shape[3] == 3 and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert x.shape[1] > image.height and x.shape[2] >= image.width >= drawing.PANEL
    assert len(image.getcolors(image.width * image.height)) > 20


@pytest.fixture
def panels(monkeypatch):
    """The pictures with captions that are drawn from now on, by their captions."""
    drawn = {}
    monkeypatch.setattr(figures, "captioned", lambda image, text: drawn.update({text: image}) or image)
    return drawn


def test_points_are_marked_in_the_picture_alone(panels):
    points = [(0.2, 0.3), (1.0, 1.0)]
    figures.overview(PHOTO, PICTURE, points)
    photo, picture = panels.values()
    assert photo == drawing.photograph(PHOTO) and picture == drawing.with_marks(drawing.photograph(PICTURE), points)


def test_maps_of_a_row_are_as_bright_as_they_compare(panels):
    heat = torch.rand(4, 6)
    figures.attention(PICTURE, "<a>", [("steps", [("1", heat), ("2", heat / 4)]), ("layers", [("3", heat / 4)])])
    for image, part, top in zip(panels.values(), (1, 4, 4), (1, 1, 4), strict=True):
        assert image == drawing.heat_over(PICTURE, heat / part, float(heat.max()) / top)


def test_each_owner_has_its_share_and_its_places(panels):
    means = torch.tensor([[[0.75, 0.125, 0.125, 0.125]], [[0.25, 0.375, 0.375, 0.375]]])
    figures.owners(PICTURE, ["<a>", "<b>"], means)
    for name, area, part in (("<a>", "25%", [0.75, 0.25, 0.25, 0.25]), ("<b>", "75%", [0.25, 0.75, 0.75, 0.75])):
        image = panels[f"{name}: {area} of the places\nits share, from 0 to 1"]
        assert image == drawing.heat_over(PICTURE, torch.tensor([part]), 1.0)


@pytest.mark.parametrize("view", ["points", "photo"])
def test_photos_show_where_the_largest_tokens_looked(panels, view):
    weights = torch.zeros(2, M)
    weights[0, 3], weights[0, 8], weights[1, 5], weights[1, 11] = 0.8, 0.4, 0.7, 0.6
    figures.photo(weights, of_token) if view == "photo" else figures.at_points(weights, 1, of_token)
    looked = [(text, image) for text, image in panels.items() if "looked at" in text]
    for (text, image), token in zip(looked, (3, 8, 5, 11), strict=True):
        assert f"token {token} looked" in text and image == drawing.heat_over(*of_token(token), 1.0)


def test_a_sheet_is_as_wide_as_its_columns():
    heats = [(str(i), torch.rand(4, 6)) for i in range(13)]
    image = figures.attention(PICTURE, "<a>", [("layers", heats)])
    assert image.width == 6 * drawing.PANEL + 5 * drawing.GAP
    assert image.height > 3 * drawing.PANEL * 48 / 32


def test_heat_is_bright_where_attention_is():
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1
    x = drawing.to_tensor(drawing.heat_over(torch.rand(64, 64, 3), heat, 1.0, width=64)).mean(-1)
    assert x[16:32, 32:48].mean() > 2 * x[48:].mean()


def color(index):
    return torch.tensor([int(drawing.MARKS[index][i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_places_have_the_color_of_their_largest_share():
    owner = torch.tensor([[0, 1, 2], [2, 0, 1]])
    part = torch.where(torch.arange(3)[:, None, None] == owner, 0.4, 0.3)
    x = drawing.to_tensor(drawing.owner_map(torch.zeros(40, 60, 3), part, width=60))[10::20, 10::20]
    likeness = torch.nn.functional.cosine_similarity(
        x, torch.stack([color(i) for i in range(3)])[:, None, None], dim=-1
    )
    assert torch.equal(likeness.argmax(0), owner) and likeness.amax(0).min() > 0.999


def test_places_of_a_layer_are_where_they_were():
    """Row by row, the first at the top left."""
    colors = torch.randint(0, 256, (6, 3)) / 255
    x = drawing.to_tensor(drawing.color_map(colors, (2, 3), (30, 20)))
    assert torch.equal(x, colors.view(2, 3, 3).repeat_interleave(10, 0).repeat_interleave(10, 1))


def has_color(image, index):
    return ((drawing.to_tensor(image) - color(index)).abs() < 1e-3).all(-1)


def test_marks_are_at_their_points():
    """x from the left, y from the top."""
    image = drawing.with_marks(drawing.to_image(torch.zeros(100, 200, 3)), [(0.25, 0.2), (0.8, 0.7)])
    for i, (row, column) in enumerate([(20, 50), (70, 160)]):
        assert has_color(image, i).nonzero().float().mean(0).tolist() == pytest.approx([row, column], abs=2)


def test_stems_are_as_high_as_their_weights():
    """Each in the place of its token; those of the second point in its own plot and colour."""
    weights = torch.zeros(2, 11)
    weights[0, 3], weights[0, 8], weights[1, 5] = 0.8, 0.4, 0.8
    image = figures.at_points(weights, 1)
    first, second = (has_color(image, i).sum(0) for i in (0, 1))
    every = drawing.stems(torch.ones(11), drawing.MARKS[0], (2 * drawing.PANEL + drawing.GAP, drawing.PANEL), 1.0)
    places = has_color(every, 0).sum(0)
    stems = [[i for i in range(len(x)) if x[i] > 50] for x in (places, first, second)]
    assert stems[1] == [*stems[0][6:8], *stems[0][16:18]] and stems[2] == stems[0][10:12]
    assert first[stems[1][0]] == pytest.approx(2 * first[stems[1][2]].item(), abs=8) == second[stems[2][0]]


def test_a_place_of_the_only_subject_is_all_its_own():
    only = drawing.to_tensor(drawing.owner_map(torch.zeros(40, 60, 3), torch.ones(1, 4, 6), width=60))
    torch.testing.assert_close(only[20, 30], 0.7 * torch.tensor(drawing.mark_color(0)), atol=0.01, rtol=0)


def test_letters_that_pillow_lacks_are_drawn_by_another_font(monkeypatch):
    """Where a system has one; the host's requirements bring none."""
    plain = drawing.font(20, "")
    assert drawing.font_of("<person> at 4x4", 20) is plain and drawing.lacks(plain, "\u00e9")
    monkeypatch.setattr(drawing, "font", lambda size, name="": {"": plain, "Arial.ttf": other}.get(name))
    other = type(
        "Font", (), {"getmask": lambda self, letter: b"no" if letter == drawing.NO_LETTER else letter.encode()}
    )()
    drawing.font_of.cache_clear()
    assert drawing.font_of("<caf\u00e9>", 20) is other and drawing.font_of("<cafe>", 20) is plain
    other.__class__.getmask = lambda self, letter: b"no"
    drawing.font_of.cache_clear()
    assert drawing.font_of("<caf\u00e9>", 20) is plain
    drawing.font_of.cache_clear()
