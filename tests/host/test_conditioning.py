"""Subjects' places survive what nodes do to conditionings, and vanish where the subject does."""

from __future__ import annotations

import comfy.hooks
import torch
from comfy_extras.nodes_hooks import SetClipHooks
from equations import Stands
from sampling import PLAIN, PROMPT, bare_encode, check, close, encode, noise, sample, text_of

from nested_attention.host.apply import apply_subject
from nested_attention.host.marks import find_placements
from nodes import ConditioningAverage, ConditioningConcat, ConditioningZeroOut


def test_concat_both_ways(applied, base_model, sites, person):
    """Concatenation keeps the first dictionary and drops the second's."""
    model, clip = applied
    subject, plain, negative = (encode(clip, text) for text in (PROMPT, "on a sunny day", "bad"))
    for first, second, column in ((subject, plain, 2), (plain, subject, 79)):
        (positive,) = ConditioningConcat().concat(first, second)
        texts = [(text_of(positive), [Stands(person, (column,))])]
        check(model, base_model, sites, texts, positive, negative)


def test_concatenated_subjects_of_one_class_word(base_model, base_clip, sites, person, other):
    """To the text encoders they are the same, and concatenation drops what the dictionary says of the second."""
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<anna>", class_word="woman")
    model, clip = apply_subject(model, clip, other, placeholder="<bob>", class_word="woman")
    anna, bob, negative = (encode(clip, text) for text in ("a <anna>", "a <bob>", "bad"))
    for first, second, who in (("here", anna, person), ("there", bob, other)):
        (positive,) = ConditioningConcat().concat(encode(clip, first), second)
        check(model, base_model, sites, [(text_of(positive), [Stands(who, (79,))])], positive, negative)


def test_a_prompt_changed_to_the_class_word_draws_nobody(applied, base_model, base_clip, sites, person):
    model, clip = applied
    negative = bare_encode(clip, "bad")
    prompts = ((PROMPT, 1.0), ("a (<person>:0.8) in a park", 0.8), ("a (<person>:1.2) in a park", 1.2))
    for positive, weight in [(bare_encode(clip, prompt), weight) for prompt, weight in prompts]:
        check(model, base_model, sites, [(text_of(positive), [Stands(person, (2,), weight)])], positive, negative)
    plain = bare_encode(clip, PLAIN)
    assert torch.equal(sample(model, plain, negative), sample(base_model, plain, negative))


def test_average(applied, base_model, sites, person, caplog):
    model, clip = applied
    subject, plain, negative = (encode(clip, text) for text in (PROMPT, "the red car at night", "bad"))
    (mixed,) = ConditioningAverage().addWeighted(subject, plain, 0.8)
    check(model, base_model, sites, [(text_of(mixed), [Stands(person, (2,))])], mixed, negative)
    (none,) = ConditioningAverage().addWeighted(subject, plain, 0.0)
    assert torch.equal(text_of(none), text_of(plain))
    close(sample(model, none, negative), sample(base_model, none, negative))
    assert "holds <person>" in caplog.text


def test_a_word_that_hardly_resembles_the_subject_is_none(applied):
    """Of an average that is nearly all another prompt."""
    _, clip = applied
    subject, other = encode(clip, PROMPT), encode(clip, "the red car at night")
    found = []
    for part in (0.1, 0.2, 0.8):
        (mixed,) = ConditioningAverage().addWeighted(subject, other, part)
        found.append(find_placements(mixed[0][0], subject[0][1]["nested_attention"], {}))
    assert found[:2] == [[[]], [[]]] and found[2] != [[]]


def test_zeroed_negative(applied, base_model, sites, person):
    model, clip = applied
    positive = encode(clip, PROMPT)
    (negative,) = ConditioningZeroOut().zero_out(positive)
    check(model, base_model, sites, [(text_of(positive), [Stands(person, (2,))])], positive, negative)


def test_conditioning_without_its_dictionary(applied, base_model, sites, person):
    """Nodes of the old style keep the text state and the pooled output alone; here with a subject more in the model."""
    model, clip = applied
    positive, negative = bare_encode(clip, PROMPT), encode(clip, "bad")
    chained, _ = apply_subject(model, clip, person, placeholder="<bob>")
    for each in (model, chained):
        check(each, base_model, sites, [(text_of(positive), [Stands(person, (2,))])], positive, negative)


def test_scheduled_clip_hooks(applied, base_model, sites, person):
    """Encoding under scheduled hooks keeps the text state and the pooled output alone, too."""
    model, clip = applied
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    (hooked,) = SetClipHooks().apply_hooks(clip, schedule_clip=True, apply_to_conds=False, hooks=hooks)
    positive = encode(hooked, PROMPT)
    assert "clip_start_percent" in positive[0][1] and "nested_attention" not in positive[0][1]
    texts = [(text_of(positive), [Stands(person, (2,))])]
    check(model, base_model, sites, texts, positive, encode(clip, "bad"))


def test_text_from_the_unpatched_clip_is_no_subject(applied, base_model, base_clip):
    model, clip = applied
    encode(clip, PROMPT)
    negative = encode(base_clip, "bad")
    for text in (PROMPT, PLAIN):
        positive = encode(base_clip, text)
        assert torch.equal(sample(model, positive, negative), sample(base_model, positive, negative))


def test_plain_row_in_a_batch_of_texts_is_known(applied):
    model, clip = applied
    subject, plain = encode(clip, PROMPT), encode(clip, "a cat")
    rows = torch.cat([plain[0][0], subject[0][0]])
    assert [[p.column for p in row] for row in find_placements(rows, [], model_ledger(model))] == [[], [2]]


def test_a_prompt_that_travels(applied, base_model, sites, person):
    """Nodes for animations mix two prompts by the frame and keep nothing but the states."""
    model, clip = applied
    first, last, negative = (encode(clip, text) for text in (PROMPT, "a <person> at the sea", "bad"))
    frames = [text_of(first).lerp(text_of(last), w) for w in (0.0, 0.3, 0.6, 1.0)]
    batch = torch.stack([*frames, text_of(encode(clip, "the red car at night")), torch.zeros_like(frames[0])])
    found = find_placements(batch, [], model_ledger(model))
    assert [[(p.placeholder, p.column) for p in row] for row in found] == [[("<person>", 2)]] * 4 + [[], []]
    ends = [text_of(encode(clip, f"<person> and <person> {where}")) for where in ("in a park", "at the sea")]
    found = find_placements(torch.stack([*ends, ends[0].lerp(ends[1], 0.4)]), [], model_ledger(model))
    assert [[p.column for p in row] for row in found] == [[1, 3]] * 3
    positive = [[torch.stack(frames), {**first[0][1], "nested_attention": None}]]
    texts = [(frame, [Stands(person, (2,))]) for frame in frames]
    check(model, base_model, sites, texts, positive, negative, latent=noise(4))


def model_ledger(model):
    [personalization] = model.get_wrappers("outer_sample", "nested_attention")
    return {k: v for ledger in personalization.ledgers for k, v in ledger.sections.items()}


def test_tiles_with_a_batch(applied, base_model, sites, person):
    """Tiling packs wrap the UNet call, slice the latent and repeat the conditioning."""
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    texts = [(text_of(positive), [Stands(person, (2,))])]

    def tiled(apply_model, args):
        x, c = args["input"], args["c"]
        tiles = torch.cat([x[..., :2], x[..., 2:]])
        repeated = {k: torch.cat([v, v]) if torch.is_tensor(v) else v for k, v in c.items()}
        out = apply_model(tiles, torch.cat([args["timestep"]] * 2), **repeated)
        return torch.cat(out.chunk(2), dim=-1)

    model, base_model = model.clone(), base_model.clone()
    for each in (model, base_model):
        each.set_model_unet_function_wrapper(tiled)
    check(model, base_model, sites, texts, positive, negative)


def test_wrapper_that_drops_the_places_warns(applied, base_model, base_clip, caplog):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    keep = ("c_crossattn", "y", "transformer_options")
    model.set_model_unet_function_wrapper(
        lambda apply_model, args: apply_model(
            args["input"], args["timestep"], **{k: v for k, v in args["c"].items() if k in keep}
        )
    )
    assert torch.equal(sample(model, positive, negative), sample(base_model, encode(base_clip, PLAIN), negative))
    assert caplog.text.count("without its conditioning") == 1


def test_missing_placeholder_warns(applied, base_model, caplog):
    model, clip = applied
    positive, negative = encode(clip, PLAIN), encode(clip, "bad")
    assert torch.equal(sample(model, positive, negative), sample(base_model, positive, negative))
    assert "No prompt holds <person>" in caplog.text
