"""Sampling with subjects, in each situation of the host, equals the equations written out."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import node_helpers
import pytest
import torch
from equations import Stands, expected_model
from sampling import (
    PLAIN,
    PROMPT,
    SIGMAS,
    check,
    close,
    count_calls,
    encode,
    guide,
    noise,
    run,
    same_text,
    sample,
    text_of,
)

from nested_attention.host.apply import apply_subject
from nested_attention.host.run import AppliedSubject, region_masks


@pytest.fixture
def couple(applied, other):
    """Two subjects, the second with a class word of its own."""
    model, clip = apply_subject(*applied, other, placeholder="<dog>", class_word="dog")
    return model, clip


def test_one_subject(applied, base_model, base_clip, sites, person):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad anatomy")
    out = check(model, base_model, sites, [(text_of(positive), [Stands(person, (2,))])], positive, negative)
    assert not torch.allclose(out, sample(base_model, positive, negative), rtol=1e-2)


def test_text_is_the_class_words_bit_for_bit(base_model, base_clip, person):
    """Once the signature is out, as without strength there is nothing else."""
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", strength=0.0)
    ours, plain, bad = encode(clip, PROMPT), encode(base_clip, PLAIN), encode(base_clip, "bad")
    assert same_text(ours, plain) and torch.equal(ours[0][1]["pooled_output"], plain[0][1]["pooled_output"])
    assert torch.equal(sample(model, ours, bad), sample(base_model, plain, bad))


def test_two_subjects(couple, base_model, sites, person, other):
    model, clip = couple
    positive, negative = encode(clip, "<person> walking a <dog>"), encode(clip, "")
    texts = [(text_of(positive), [Stands(person, (1,)), Stands(other, (4,))])]
    check(model, base_model, sites, texts, positive, negative)


def test_subject_in_the_negative_alone(applied, base_model, sites, person):
    model, clip = applied
    positive, negative = encode(clip, "a park"), encode(clip, PROMPT)
    check(model, base_model, sites, [(text_of(negative), [Stands(person, (2,))])], positive, negative)


def test_negative_of_the_same_words_stays_plain(applied, base_model, base_clip, sites, person):
    """'a person in a park' has the text states of 'a <person> in a park', and is no subject."""
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, PLAIN)
    assert same_text(positive, negative)
    wrong = sample(expected_model(base_model, sites, [(text_of(positive), [Stands(person, (2,))])]), positive, negative)
    mixed = sample(model, positive, negative)
    assert not torch.allclose(mixed, wrong, rtol=1e-2)
    close(sample(model, negative, negative), sample(base_model, negative, negative))


@pytest.mark.parametrize("sampled", ["positive first", "negative first"])
def test_order_of_the_batch(applied, base_model, sites, person, sampled, monkeypatch):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    texts = [(text_of(positive), [Stands(person, (2,))])]
    if sampled == "negative first":  # a guider of the field that lists its conditionings the other way
        original = comfy.samplers.calc_cond_batch
        monkeypatch.setattr(
            comfy.samplers,
            "calc_cond_batch",
            lambda model, conds, *args: original(model, conds[::-1], *args)[::-1],
        )
    check(model, base_model, sites, texts, positive, negative)


def test_chunks_split_by_memory(applied, base_model, sites, person, monkeypatch):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    whole = sample(model, positive, negative)
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    calls = count_calls(model)
    close(sample(model, positive, negative), whole)
    assert calls == [1, 1, 1, 1]


def test_cond_and_uncond_stay_one_batch(applied):
    model, clip = applied
    calls = count_calls(model)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert calls == [2, 2]


def test_cfg_one(applied, base_model, sites, person):
    model, clip = applied
    positive = encode(clip, PROMPT)
    check(model, base_model, sites, [(text_of(positive), [Stands(person, (2,))])], positive, encode(clip, ""), cfg=1.0)


def test_latent_batch_of_four(applied, base_model, sites, person):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    texts = [(text_of(positive), [Stands(person, (2,))])]
    check(model, base_model, sites, texts, positive, negative, latent=noise(batch=4, size=(4, 4)))


def test_dual_cfg(couple, base_model, sites, person, other):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    model, clip = couple
    conds = [encode(clip, text) for text in ("a <person>", "some <dog> here", "bad")]
    texts = [(text_of(conds[0]), [Stands(person, (2,))]), (text_of(conds[1]), [Stands(other, (2,))])]

    def out(model):
        guider = Guider_DualCFG(model)
        guider.set_conds(*conds)
        guider.set_cfg(3.0, 2.0)
        return run(guider)

    close(out(model), out(expected_model(base_model, sites, texts)))


def test_perp_neg(applied, base_model, sites, person):
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    model, clip = applied
    conds = [encode(clip, text) for text in (PROMPT, "bad", "")]

    def out(model):
        guider = Guider_PerpNeg(model)
        guider.set_conds(*conds)
        guider.set_cfg(3.0, 1.0)
        return run(guider)

    close(out(model), out(expected_model(base_model, sites, [(text_of(conds[0]), [Stands(person, (2,))])])))


def test_combined_conditionings(couple, base_model, sites, person, other):
    model, clip = couple
    a, b = encode(clip, PROMPT), encode(clip, "the <dog>")
    texts = [(text_of(a), [Stands(person, (2,))]), (text_of(b), [Stands(other, (2,))])]
    check(model, base_model, sites, texts, a + b, encode(clip, "bad"))


AREAS = {
    "area": {"area": (4, 8, 4, 0), "strength": 1.0},
    "percentage": {"area": ("percentage", 0.5, 1.0, 0.5, 0.0), "strength": 1.0},
    "mask": {"mask": torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], dim=2), "set_area_to_bounds": False},
    "mask to bounds": {"mask": torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], 2), "set_area_to_bounds": True},
    "timestep range": {"start_percent": 0.0, "end_percent": 0.5},
}


@pytest.mark.parametrize("kind", AREAS)
def test_areas_masks_and_timesteps(couple, base_model, sites, person, other, kind):
    """With areas the host copies the positive entry into the negative list, with the negative's text."""
    model, clip = couple
    a, b, negative = encode(clip, PROMPT), encode(clip, "the <dog>"), encode(clip, "bad")
    texts = [(text_of(a), [Stands(person, (2,))]), (text_of(b), [Stands(other, (2,))])]
    positive = node_helpers.conditioning_set_values(a, AREAS[kind]) + b
    check(model, base_model, sites, texts, positive, negative, latent=noise(size=(8, 8)))


LONG = ", ".join(["a detailed photo"] * 26)  # two sections of 77 tokens
LONGER = ", ".join(["a detailed photo"] * 130)  # seven


@pytest.mark.parametrize("negative, length", [(LONG, 154), (LONGER, 539)])
def test_texts_of_different_length(applied, base_model, sites, person, negative, length):
    """The host repeats a short text beside a long one: the subject stands in every copy."""
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, negative)
    assert negative[0][0].shape[1] == length
    check(model, base_model, sites, [(text_of(positive), [Stands(person, (2,))])], positive, negative)


def test_subject_in_a_later_section(applied, base_model, sites, person):
    model, clip = applied
    positive = encode(clip, LONG + ", and a <person>")
    column = 77 + position(clip, LONG + ", and a <person>")[1]
    check(model, base_model, sites, [(text_of(positive), [Stands(person, (column,))])], positive, encode(clip, "bad"))


def position(clip, text):
    """Section and column of the subject in the tokens."""
    sections = clip.tokenize(text)["l"]
    found = [(i, j) for i, s in enumerate(sections) for j, t in enumerate(s) if hasattr(t[0], "nested_placeholder")]
    assert len(found) == 1
    return found[0]


def test_chunk_border(applied, base_model, sites, person):
    """75 words fill a section: with one more before it, the subject moves to the next."""
    model, clip = applied
    for words, place in ((74, (0, 75)), (75, (1, 1))):
        text = "cat " * words + "<person>"
        # Weighted, the placeholder is a segment of its own; the host then breaks the section before it.
        text = text.replace("<person>", "(<person>:1.0)")
        assert position(clip, text) == place
        positive = encode(clip, text)
        column = 77 * place[0] + place[1]
        check(model, base_model, sites, [(text_of(positive), [Stands(person, (column,))])], positive, encode(clip, ""))


def test_placeholder_twice(applied, base_model, sites, person):
    model, clip = applied
    positive = encode(clip, "<person> and <person>")
    check(model, base_model, sites, [(text_of(positive), [Stands(person, (1, 3))])], positive, encode(clip, ""))


def test_weight_on_the_placeholder_is_strength(applied, base_model, base_clip, sites, person):
    model, clip = applied
    positive = encode(clip, "a (<person>:1.3) in a park")
    assert same_text(positive, encode(base_clip, PLAIN))
    check(model, base_model, sites, [(text_of(positive), [Stands(person, (2,), 1.3)])], positive, encode(clip, ""))
    both = encode(clip, "(<person>:0.5) and (<person>:1.3)")
    stands = [Stands(person, (1,), 0.5), Stands(person, (3,), 1.3)]
    check(model, base_model, sites, [(text_of(both), stands)], both, encode(clip, ""))


def test_strength_and_token_weight(base_model, base_clip, sites, person):
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", strength=0.7, token_weight=1.8)
    positive = encode(clip, PROMPT)
    texts = [(text_of(positive), [Stands(person, (2,), 0.7, 1.8)])]
    check(model, base_model, sites, texts, positive, encode(clip, ""))


def test_the_users_norm_goes_before_the_files(base_model, base_clip, sites, person):
    free = replace(person, adapter=replace(person.adapter, config=replace(person.adapter.config, norm="off")))
    model, clip = apply_subject(base_model, base_clip, free, placeholder="<person>")
    positive = encode(clip, PROMPT)
    check(model, base_model, sites, [(text_of(positive), [Stands(free, (2,))])], positive, encode(clip, ""))


def test_batched_prompts(couple, base_model, sites, person, other):
    """One conditioning with a text for each latent, as batch-prompt nodes make it."""
    model, clip = couple
    a, b, c = (encode(clip, text) for text in (PROMPT, "the <dog>", "nobody"))
    texts = [(text_of(a), [Stands(person, (2,))]), (text_of(b), [Stands(other, (2,))])]
    positive = [[torch.cat([x[0][0] for x in (a, b, c)]), dict(a[0][1])]]
    check(model, base_model, sites, texts, positive, encode(clip, "bad"), latent=noise(batch=3, size=(4, 4)))


def test_refiner_style_two_samplers(applied, base_model, sites, person):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    texts = [(text_of(positive), [Stands(person, (2,))])]
    expected = expected_model(base_model, sites, texts)

    def both(first, second):
        middle = run(guide(first, positive, negative), sigmas=torch.tensor([4.0, 1.0]))
        return run(guide(second, positive, negative), latent=middle, sigmas=torch.tensor([1.0, 0.0]))

    close(both(model, model), both(expected, expected))
    close(both(model, base_model), both(expected, base_model))


def test_range_of_steps(base_model, base_clip, sites, person):
    """From 0 to 50 percent: the first step (sigma 4 is before the middle) has the subject, the last has not."""
    sampling = base_model.get_model_object("model_sampling")
    middle = sampling.percent_to_sigma(0.5)
    assert SIGMAS[0] > middle > SIGMAS[1]
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", end_percent=0.5)
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    expected = expected_model(base_model, sites, [(text_of(positive), [Stands(person, (2,))])])
    halfway = run(guide(expected, positive, negative), sigmas=SIGMAS[:2])
    close(run(guide(model, positive, negative), sigmas=SIGMAS[:2]), halfway)
    latter = SIGMAS[1:]
    close(
        run(guide(model, positive, negative), sigmas=latter), run(guide(base_model, positive, negative), sigmas=latter)
    )


def test_range_of_the_last_steps(base_model, base_clip, sites, person):
    """From 50 to 100 percent: the other way round."""
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", start_percent=0.5)
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    first, latter = SIGMAS[:2], SIGMAS[1:]
    close(run(guide(model, positive, negative), sigmas=first), run(guide(base_model, positive, negative), sigmas=first))
    expected = expected_model(base_model, sites, [(text_of(positive), [Stands(person, (2,))])])
    close(run(guide(model, positive, negative), sigmas=latter), run(guide(expected, positive, negative), sigmas=latter))


@pytest.mark.parametrize("choice", [{"start_percent": 0.5}, {"end_percent": 0.5}])
def test_a_range_of_steps_has_its_ends(base_model, base_clip, sites, person, choice):
    """As flow models begin at the very sigma of 0 percent."""
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", **choice)
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    middle = base_model.get_model_object("model_sampling").percent_to_sigma(0.5)
    texts = [(text_of(positive), [Stands(person, (2,))])]
    check(model, base_model, sites, texts, positive, negative, sigmas=torch.tensor([middle, 0.0]))


def half(height, width, side):
    mask = torch.zeros(height, width)
    mask[:, : width // 2] = 1
    return mask if side == "left" else mask.flip(1)


def test_regions(base_model, base_clip, sites, person, other):
    """Each subject in its half of the picture; the mask comes at the picture's size, not the latent's."""
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<anna>", region=half(64, 64, "left")[None])
    model, clip = apply_subject(model, clip, other, placeholder="<bob>", region=half(64, 64, "right")[None])
    positive = encode(clip, "<anna> and <bob>")
    left, right = (Stands(b, (c,), region=half(8, 8, s)) for b, c, s in ((person, 1, "left"), (other, 3, "right")))
    texts = [(text_of(positive), [left, right])]
    check(model, base_model, sites, texts, positive, encode(clip, "bad"), latent=noise(size=(8, 8)))


def test_a_region_counts_with_all_of_its_area(person):
    """Each latent pixel has the mean of the mask's pixels that it covers."""
    region = torch.rand(1, 16, 24)
    subjects = [
        AppliedSubject(name, person.subject.tokens, person.adapter, region=r)
        for name, r in (("<a>", region), ("<b>", None))
    ]
    masks = region_masks(subjects, torch.empty(1, 4, 2, 3))
    torch.testing.assert_close(masks[0, 0], region.view(2, 8, 3, 8).mean((1, 3)))
    assert (masks[0, 1] == 1).all()
    brighter = replace(subjects[0], region=1 + region)
    assert (region_masks([brighter], torch.empty(1, 4, 2, 3)) == 1).all()
    several = replace(subjects[0], region=torch.rand(3, 16, 24))
    assert region_masks([subjects[0], several], torch.empty(3, 4, 2, 3)).shape == (3, 2, 2, 3)


def test_a_region_of_another_shape_is_said(base_model, base_clip, person, caplog):
    """As where a detailer samples a part of the picture for which the region was painted."""
    for height, width in ((64, 64), (64, 96)):
        region = half(height, width, "left")[None]
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<anna>", region=region)
        sample(model, encode(clip, "<anna>"), encode(clip, "bad"))
        assert ("The region of <anna> is of another shape" in caplog.text) is (height != width)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"region": torch.zeros(1, 64, 64)}, "The region of <anna> is empty"),
        ({"region": torch.full((1, 64, 64), 0.004)}, "The region of <anna> is empty"),
        ({"region": torch.ones(2, 64, 64)}, "The region of <anna> is 2 masks for 3 pictures"),
        ({"region": torch.ones(4, 64, 64)}, "The region of <anna> is 4 masks for 3 pictures"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "begins at 0.5 of the sampling and ends at 0.5"),
    ],
)
def test_a_choice_that_can_hardly_be_meant_is_said(base_model, base_clip, person, caplog, choice, said):
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<anna>", **choice)
    sample(model, encode(clip, "<anna>"), encode(clip, "bad"), latent=noise(3, (8, 8)))
    assert said in caplog.text


@pytest.mark.parametrize("broken", ["tokens", "to_k", "to_v"])
def test_values_that_are_no_numbers_are_refused(base_model, base_clip, person, broken, monkeypatch):
    """They would make the picture black."""
    layer = person.adapter.patcher.model.layers[1]
    place = person.subject.tokens if broken == "tokens" else getattr(layer, broken).weight
    monkeypatch.setattr(place, "data", place * torch.nan)
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<anna>")
    with pytest.raises(ValueError, match="values of <anna> are no numbers in float32"):
        sample(model, encode(clip, "<anna>"), encode(clip, "bad"))


def test_a_region_for_one_of_two(base_model, base_clip, sites, person, other):
    """In shades, which deeper layers see bilinearly."""
    region = torch.rand(8, 8)
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<anna>", region=region[None])
    model, clip = apply_subject(model, clip, other, placeholder="<bob>")
    positive = encode(clip, "<anna> and <bob>")
    texts = [(text_of(positive), [Stands(person, (1,), region=region), Stands(other, (3,))])]
    latent = noise(batch=2, size=(8, 8))
    check(model, base_model, sites, texts, positive, encode(clip, "bad"), latent=latent)


def test_a_region_for_each_picture_of_a_batch(base_model, base_clip, person):
    """As many masks as pictures, also where each has a text of its own; the first where there is one picture."""
    masks = torch.stack([half(8, 8, "left"), half(8, 8, "right")])
    latent = noise(batch=2, size=(8, 8))

    def drawn(region, latent, *texts):
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", region=region)
        rows = torch.cat([text_of(encode(clip, text))[None] for text in texts or (PROMPT,)])
        positive = [[rows, encode(clip, PROMPT)[0][1]]]
        return sample(model, positive, encode(clip, "bad"), latent=latent)

    both = drawn(masks, latent)
    for i in range(2):
        close(both[i : i + 1], drawn(masks[i], latent)[i : i + 1])
    close(drawn(masks, latent, PLAIN, PROMPT)[1:], both[1:])
    assert torch.equal(drawn(masks, latent[:1]), drawn(masks[:1], latent[:1]))


@pytest.fixture
def two_women(base_model, base_clip, person, other):
    """Two subjects of one class word, as model and CLIP made with these choices for the first and the second."""

    def make(first, second):
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<anna>", class_word="woman", **first)
        return apply_subject(model, clip, other, placeholder="<bob>", class_word="woman", **second)

    return make


def test_two_subjects_of_one_class(two_women, base_model, sites, person, other):
    model, clip = two_women({}, {})
    positive, same = encode(clip, "<anna> and <bob>"), encode(clip, "woman and woman")
    assert same_text(positive, same)
    texts = [(text_of(positive), [Stands(person, (1,)), Stands(other, (3,))])]
    apart = check(model, base_model, sites, texts, positive, encode(clip, "bad"))
    assert not torch.allclose(apart, sample(model, encode(clip, "<bob> and <anna>"), encode(clip, "bad")), rtol=1e-2)


COMPETITIONS = {
    "set on one": ({"competition": 2.0}, {}, "<anna> and <bob>"),
    "regions": (
        {"region": half(4, 4, "left")[None], "strength": 0.8},
        {"competition": 1.0, "token_weight": 1.5},
        "<anna> and <bob>",
    ),
    "a subject twice": ({"competition": 3.0}, {"competition": 1.0}, "<anna> and <bob>, (<anna>:0.5)"),
}


@pytest.mark.parametrize("attention", ["the host's own", "another backend"])
@pytest.mark.parametrize("case", COMPETITIONS)
def test_competition(case, attention, two_women, base_model, sites, person, other):
    *choices, prompt = COMPETITIONS[case]
    model, clip = two_women(*choices)
    if attention == "another backend":
        options = model.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda f, *args, **kwargs: f(*args, **kwargs)
    positive, negative = encode(clip, prompt), encode(clip, "bad")
    anna, bob = (
        Stands(
            bound,
            (column,),
            each.get("strength", 1.0),
            each.get("token_weight", 1.0),
            None if each.get("region") is None else each["region"][0],
            each.get("competition", 0.0),
        )
        for bound, column, each in zip((person, other), (1, 3), choices, strict=True)
    )
    again = [replace(anna, columns=(5,), strength=0.5)] if case == "a subject twice" else []
    latent = noise(batch=2)
    texts = [(text_of(positive), [anna, bob, *again])]
    out = check(model, base_model, sites, texts, positive, negative, latent=latent)
    alone, _ = two_women(*({**each, "competition": 0.0} for each in choices))
    assert not torch.allclose(out, sample(alone, positive, negative, latent=latent), rtol=1e-2)


def test_a_region_is_cropped_with_the_area(base_model, base_clip, sites, person):
    """Area conditioning runs the UNet on a crop of the latent: the region there is the crop of the region."""
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", region=half(8, 8, "left")[None])
    subject, plain, negative = (encode(clip, text) for text in (PROMPT, "a park", "bad"))
    positive = node_helpers.conditioning_set_values(subject, {"area": (8, 4, 0, 2), "strength": 1.0}) + plain
    crop = half(8, 8, "left")[:, 2:6]
    texts = [(text_of(subject), [Stands(person, (2,), region=crop)])]
    check(model, base_model, sites, texts, positive, negative, latent=noise(size=(8, 8)))


def test_a_region_nowhere_is_the_plain_word(base_model, base_clip, person):
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", region=torch.zeros(1, 8, 8))
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    close(sample(model, positive, negative), sample(base_model, positive, negative))


def test_lora_on_the_model_after_the_subject(applied, base_model, sites, person):
    model, clip = applied
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    patch = {key: ("diff", (torch.randn_like(base_model.model.state_dict()[key]) * 0.3,))}
    changed, base = model.clone(), base_model.clone()
    for each in (changed, base):
        assert each.add_patches(patch, 1.0) == [key]
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    out = check(changed, base, sites, [(text_of(positive), [Stands(person, (2,))])], positive, negative)
    assert not torch.allclose(out, sample(model, positive, negative), rtol=1e-2)
