"""What is recorded is what the equations say the run attended to, and recording it changes nothing."""

from __future__ import annotations

from dataclasses import replace

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from equations import Stands
from reference import regularised_lookup
from sampling import PROMPT, SIGMAS, encode, guide, noise, run, sample, text_of
from small_models import make_clip_vision, make_model

import nodes
from nested_attention.attention import split_heads
from nested_attention.host.adapters import BoundSubject, nested_tokens
from nested_attention.host.apply import apply_subject
from nested_attention.host.images import encode as see
from nested_attention.host.inspection import VIEWS, inspect, look_at_photos, lookups, spread
from nested_attention.host.recording import record_model, step_of
from nested_attention.inspection import drawing, figures
from nested_attention.inspection.views import nested_attention, nested_values
from nested_attention.subject import Subject


@pytest.fixture
def couple(applied, other):
    """Two subjects, the second with a class word of its own."""
    return apply_subject(*applied, other, placeholder="<dog>", class_word="dog")


def listen(model, sites):
    """A clone whose layers also write down the queries, keys and values that they get, by layer, call by call."""
    heard = {}
    model = model.clone()
    for layer, site in enumerate(sites):

        def attend(q, k, v, extra_options, layer=layer):
            heads = extra_options["n_heads"]
            parts = [split_heads(x, heads).to("cpu", copy=True) for x in (q, k, v)]
            heard.setdefault(layer, []).append((*parts, extra_options["activations_shape"][2:4]))
            return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads)

        model.set_model_attn2_replace(attend, *site.key)
    return model, heard


def softmax_column(q, k, columns, weight=1.0):
    """p_s [N] of one row, the mean over heads of softmax(q K^T / sqrt d)."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    for c in columns:
        logits[..., c] = torch.maximum(logits[..., c], weight * logits[..., c])
    return logits.softmax(-1)[..., columns].sum(-1).mean(0)


def recorded(applied_model, sites, positive, negative, record=None, **kwargs):
    """The recording of a run whose layers also write down what they get, in the host's order: positive rows last."""
    model, recording = record_model(applied_model, **(record or {}))
    model, heard = listen(model, sites)
    sample(model, positive, negative, **kwargs)
    return recording, heard


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_attention_is_the_softmax_column(applied, sites, cfg):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    recording, heard = recorded(model, sites, positive, negative, cfg=cfg, latent=noise(size=(8, 4)))
    record = recording.record
    assert record.steps() == [1, 2] and recording.total == 2 and len(record.maps) == 2 * len(sites)
    assert sorted(record.layers()) == [*range(len(sites))] and recording.complete and recording.seed == 1
    for (step, layer, subject), p in record.maps.items():
        q, k, _, size = heard[layer][step - 1]
        assert len(q) == (2 if cfg > 1 else 1) and subject == 0
        torch.testing.assert_close(p, softmax_column(q[-1], k[-1], [2]).view(*size))
        assert record.labels[layer].endswith(f"{size[0]}x{size[1]}")


def test_the_fused_kernel_says_the_same(applied, sites):
    """Beside other nodes' patches p_s comes from a softmax of our own, alone from the host's kernel."""
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    beside, _ = recorded(model, sites, positive, negative)
    model, alone = record_model(model)
    sample(model, positive, negative)
    assert alone.record.maps.keys() == beside.record.maps.keys()
    for key, p in beside.record.maps.items():
        torch.testing.assert_close(alone.record.maps[key], p, rtol=1e-3, atol=1e-5)


def test_subjects_that_compete(base_model, base_clip, person, other):
    """What is recorded is what the layers used in the end: the same attention together, otherwise divided."""
    runs = []
    for competition in (0.0, 4.0):
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", competition=competition)
        model, clip = apply_subject(model, clip, other, placeholder="<dog>", class_word="dog")
        model, recording = record_model(model, steps="1")
        sample(model, encode(clip, "<person> walking a <dog>"), encode(clip, ""))
        runs.append([recording.record.maps[1, 0, subject] for subject in (0, 1)])
    (a, b), (c, d) = runs
    torch.testing.assert_close(a + b, c + d)
    assert ((c - d).abs() > (a - b).abs()).float().mean() > 0.9


def test_token_weight_and_repeated_text(base_model, base_clip, person, sites):
    """A short prompt beside a long one stands twice in its row; the token weight raises both."""
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", token_weight=1.6)
    positive, negative = encode(clip, PROMPT), encode(clip, "bad " * 90)
    recording, heard = recorded(model, sites, positive, negative)
    for (step, layer, _), p in recording.record.maps.items():
        q, k, _, size = heard[layer][step - 1]
        torch.testing.assert_close(p, softmax_column(q[-1], k[-1], [2, 79], 1.6).view(*size), rtol=1e-4, atol=1e-6)


def test_two_subjects_and_their_places(couple, sites):
    model, clip = couple
    positive, negative = encode(clip, "<person> walking a <dog>"), encode(clip, "")
    recording, heard = recorded(model, sites, positive, negative)
    assert [s.placeholder for s in recording.subjects] == ["<person>", "<dog>"]
    for (step, layer, subject), p in recording.record.maps.items():
        q, k, _, size = heard[layer][step - 1]
        torch.testing.assert_close(p, softmax_column(q[-1], k[-1], [(1, 4)[subject]]).view(*size))
    assert {subject for _, _, subject in recording.record.maps} == {0, 1}


@pytest.mark.parametrize("norm", ["rescale", "off"])
def test_values_and_stems_are_the_equations(applied, sites, other, norm):
    """With the norm that Load Nested Adapter was asked for, whichever the file has."""
    other = replace(other, adapter=replace(other.adapter, config=replace(other.adapter.config, norm=norm)))
    model, clip = apply_subject(*applied, other, placeholder="<dog>", class_word="dog")
    positive, negative = encode(clip, "<person> walking a <dog>"), encode(clip, "")
    recording, heard = recorded(model, sites, positive, negative)
    for layer, seen in enumerate(lookups(recording, 1, range(len(sites)))):
        q, _, v, size = heard[layer][-1]
        token = Stands(other, (4,)).token(layer, sites[layer].heads, size)
        assert seen.size == tuple(size) and torch.equal(seen.q[0], q[-1])
        torch.testing.assert_close(seen.textual[0, :, 0], v[-1, :, 4])
        values = nested_values(seen)
        for i in range(q.shape[2]):
            expected = regularised_lookup(q[-1, :, i], token)(v[-1, :, 4]).flatten()
            torch.testing.assert_close(values[i], expected, rtol=1e-3, atol=1e-4)
        logits = q[-1] @ token.keys[0].transpose(-1, -2) * q.shape[-1] ** -0.5
        stems = nested_attention(seen, range(q.shape[2]))
        torch.testing.assert_close(stems, logits.softmax(-1).mean(0), rtol=1e-4, atol=1e-6)


def test_entries_with_the_same_subject_are_averaged(applied, sites):
    """As of two prompts that Conditioning (Combine) puts together."""
    model, clip = applied
    positive = encode(clip, PROMPT) + encode(clip, "a <person> on a red bicycle")
    recording, heard = recorded(model, sites, positive, encode(clip, "bad"))
    for (step, layer, _), p in recording.record.maps.items():
        q, k, _, size = heard[layer][step - 1]
        assert len(q) == 3
        expected = (softmax_column(q[1], k[1], [2]) + softmax_column(q[2], k[2], [2])) / 2
        torch.testing.assert_close(p, expected.view(*size))


@pytest.mark.parametrize("picture", [0, 2, 9])
def test_one_picture_of_a_batch(applied, sites, person, picture):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    latent, row = noise(batch=3), min(picture, 2)
    recording, heard = recorded(model, sites, positive, negative, {"picture": picture}, latent=latent, cfg=2.0)
    for (step, layer, _), p in recording.record.maps.items():
        q, k, _, size = heard[layer][step - 1]
        assert len(q) == 6
        torch.testing.assert_close(p, softmax_column(q[3 + row], k[3 + row], [2]).view(*size))
        assert torch.equal(recording.record.asked(layer, 0).q, q[3 + row].transpose(0, 1).flatten(1)) or step == 1
    pictures = torch.rand(3, 32, 32, 3)
    assert torch.equal(inspect(recording, person, pictures, layers="", points=[]).picture, pictures[row])


def test_chunks_split_by_memory(applied, monkeypatch):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    (whole, first), (split, second) = (record_model(model) for _ in "ab")
    sample(whole, positive, negative, latent=noise(batch=2))
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    sample(split, positive, negative, latent=noise(batch=2))
    assert first.record.maps.keys() == second.record.maps.keys()
    for key, p in first.record.maps.items():
        torch.testing.assert_close(second.record.maps[key], p, rtol=1e-3, atol=1e-5)


def test_recording_changes_no_bit(couple):
    model, clip = couple
    positive, negative = encode(clip, "<person> walking a <dog>"), encode(clip, "bad")
    expected = sample(model, positive, negative, latent=noise(batch=2))
    watched, recording = record_model(model)
    torch.manual_seed(0)
    assert torch.equal(sample(watched, positive, negative, latent=noise(batch=2)), expected)
    state = torch.get_rng_state()
    assert torch.equal(sample(model, positive, negative, latent=noise(batch=2)), expected)
    assert recording.record.maps and torch.equal(torch.get_rng_state(), state)


def test_before_or_after_apply_subject(base_model, base_clip, person):
    model, first = record_model(base_model)
    model, clip = apply_subject(model, base_clip, person, placeholder="<person>")
    after, second = record_model(apply_subject(base_model, base_clip, person, placeholder="<person>")[0])
    for each in (model, after):
        sample(each, encode(clip, PROMPT), encode(clip, "bad"))
    assert first.record.maps.keys() == second.record.maps.keys()
    for key, p in first.record.maps.items():
        assert torch.equal(second.record.maps[key], p)


def test_of_two_records_the_last_listens(applied):
    model, clip = applied
    model, first = record_model(model)
    model, last = record_model(model)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert last.record.maps and not first.record.maps


def test_chosen_steps_and_layers(applied):
    model, clip = applied
    sigmas = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.0])
    model, recording = record_model(model, steps="2, last", layers="middle, output 3.")
    sample(model, encode(clip, PROMPT), encode(clip, "bad"), sigmas=sigmas)
    record = recording.record
    assert record.steps() == [2, 4] and [record.labels[n] for n in record.layers()] == [
        "middle 0.0 2x2",
        "middle 0.1 2x2",
        "output 3.0 4x4",
    ]
    assert record.layers("4x4") == record.layers("output") == record.layers()[2:]
    assert record.queries.keys() == {(layer, (0,)) for layer in record.layers()}


def test_steps_of_samplers_that_call_twice(applied):
    """Heun calls the model at the next step's sigma too: no call is lost, and maps of a step are averaged."""
    model, clip = applied
    model, recording = record_model(model)
    sampler = comfy.samplers.sampler_object("heun")
    latent = noise()
    guider = guide(model, encode(clip, PROMPT), encode(clip, "bad"))
    guider.sample(latent, torch.zeros_like(latent), sampler, SIGMAS, seed=1)
    assert recording.record.steps() == [1, 2] and recording.record.counts[2, 0, 0] == 2
    options = {"sample_sigmas": torch.tensor([8.0, 4.0, 1.0, 0.0]), "sigmas": torch.tensor([3.0, 3.0])}
    assert step_of(options) == (2, 3) and step_of({}) == (1, 1)


def test_memory_stays_within_the_limit(applied, sites):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    limit = 12_000
    small, recording = record_model(model, limit=limit)
    sample(small, positive, negative, latent=noise(size=(8, 8)))
    record = recording.record
    queries = [x for each in record.queries.values() for x in (each.q, *each.textual.values())]
    assert record.used == sum(x.nbytes for x in (*record.maps.values(), *queries)) <= limit
    assert 0 < len(record.queries) < len(sites) and record.left_out and len(record.maps) == 2 * len(sites)
    assert f"queries of {len(record.left_out)} layers" in recording.summary()


def test_half_precision_is_kept_as_it_is(base_clip, person):
    model = make_model(torch.bfloat16, torch.bfloat16)
    model, clip = apply_subject(model, base_clip, person, placeholder="<person>")
    model, recording = record_model(model)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert {each.q.dtype for each in recording.record.queries.values()} == {torch.bfloat16}
    assert all(nested_values(seen).isfinite().all() for seen in lookups(recording, 0, recording.record.layers()))


def test_each_run_forgets_the_one_before(applied, base_clip):
    model, clip = applied
    model, recording = record_model(model)
    assert "No sampler has run" in recording.why_empty()
    with pytest.raises(ValueError, match="The record is empty. No sampler has run"):
        recording.require_run(None, None)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    before = dict(recording.record.maps)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"), latent=noise(seed=8))
    assert before.keys() == recording.record.maps.keys() and recording.record.counts[1, 0, 0] == 1
    assert not torch.equal(recording.record.maps[2, 0, 0], before[2, 0, 0])
    sample(model, encode(clip, "a park"), encode(clip, "bad"))
    with pytest.raises(ValueError, match="The record is empty. The prompt holds no subject"):
        recording.require_run(None, None)


def test_an_interrupted_run_is_not_shown(applied):
    model, clip = applied
    model, recording = record_model(model)
    calls = []

    def interrupt(executor, *args, **kwargs):
        calls.append(executor(*args, **kwargs))
        if len(calls) == 2:
            raise comfy.model_management.InterruptProcessingException()
        return calls[-1]

    model.add_wrapper_with_key("apply_model", "interrupt", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert recording.record.maps
    with pytest.raises(ValueError, match="was interrupted"):
        recording.require_run(None, None)


def test_parts_of_the_picture_are_left_out_and_said(applied):
    model, clip = applied
    model, recording = record_model(model)
    positive = nodes.ConditioningSetArea().append(encode(clip, PROMPT), 16, 16, 0, 0, 1.0)[0]
    sample(model, positive + encode(clip, "a park"), encode(clip, "bad"))
    assert not recording.record.maps and recording.partial
    with pytest.raises(ValueError, match="parts of the picture"):
        recording.require_run(None, None)


def test_parts_of_the_batch_are_left_out(applied):
    """Of a node that hands pictures to the model one at a time nobody knows which they are."""
    model, clip = applied
    model, recording = record_model(model)

    def one_by_one(apply_model, args):
        parts = {"x": args["input"], "t": args["timestep"], **args["c"]}
        rows = [{k: v[i, None] if torch.is_tensor(v) else v for k, v in parts.items()} for i in range(len(parts["x"]))]
        return torch.cat([apply_model(row.pop("x"), row.pop("t"), **row) for row in rows])

    model.set_model_unet_function_wrapper(one_by_one)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"), latent=noise(batch=2))
    assert not recording.record.maps and recording.partial == 8


def test_a_node_that_samples_part_by_part_is_said(applied):
    """Of a job, as upscalers by tiles do; the next job begins anew."""
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    model, recording = record_model(model)
    for job, said in (("1", False), ("1", True), ("2", False)):
        with CurrentNodeContext(job, "5"):
            sample(model, positive, negative)
        assert ("The node sampled 2 times" in recording.summary()) is said


def graph(seed=1, **changes):
    nodes = {
        "1": {"class_type": "NestedAttentionRecord", "inputs": {"steps": "all"}},
        "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": seed}},
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0]}},
        "4": {"class_type": "NestedAttentionInspect", "inputs": {"generated": ["3", 0], "record": ["1", 1]}},
        "5": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": 9}},
    }
    return {**nodes, **changes}


def test_a_picture_of_another_run_is_noticed(applied):
    """The host keeps results of earlier prompts: back at the first seed it neither samples nor records again."""
    model, clip = applied
    model, recording = record_model(model)

    def queue(seed):
        with CurrentNodeContext("prompt", "2"):
            sample(model, encode(clip, PROMPT), encode(clip, "bad"), latent=noise(seed=seed))
        recording.require_run(graph(seed), ["3", 0])

    queue(1)
    recording.require_run(graph(1), ["3", 0])  # another view of the same run
    recording.require_run(graph(1, **{"6": {"class_type": "Note", "inputs": {}}}), ["3", 0])
    queue(2)
    with pytest.raises(ValueError, match="of another run.*change a value of Record Nested Attention"):
        recording.require_run(graph(1), ["3", 0])
    recording.require_run(graph(2), ["3", 0])
    with pytest.raises(ValueError, match="sampler in node 2, the picture comes from elsewhere"):
        recording.require_run(graph(2), ["5", 0])


@pytest.fixture(scope="module")
def photographed(adapter):
    """A subject of two photos, what the encoder saw of them, and the encoder."""
    vision = make_clip_vision()
    photos = torch.rand(2, 50, 40, 3, generator=torch.Generator().manual_seed(5))
    seen, features = see(vision, photos, None, "pad", adapter.config)
    tokens = nested_tokens(adapter, features).reshape(1, -1, adapter.config.output_dim)
    return BoundSubject(Subject(tokens, adapter.fingerprint, adapter.name), adapter), seen, vision


def test_heat_over_the_photo_is_the_q_formers_attention(adapter, photographed):
    bound, seen, vision = photographed
    looked, said = look_at_photos(adapter, vision, seen, bound.subject.tokens)
    assert not said and looked.attention.shape == (2, 12, 4, 4)
    maps = []
    adapter.patcher.model.resampler(vision.encode_image(seen[1:]).last_hidden_state, observe=maps.append)
    expected = torch.stack([m.mean(1) for m in maps]).mean(0)[0]
    photo, heat = looked.of_token(12 + 7)
    torch.testing.assert_close(heat.flatten(), expected[7, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(photo, seen[1], atol=2 / 255, rtol=0)


def test_other_photos_are_noticed(adapter, photographed):
    bound, seen, vision = photographed
    others, said = look_at_photos(adapter, vision, torch.rand(2, 32, 32, 3), bound.subject.tokens)
    assert others and "This photo makes other tokens" in said
    nothing, said = look_at_photos(adapter, vision, seen[:1], bound.subject.tokens)
    assert nothing is None and "the subject has 24, of 1 photos come 12. Connect the output 'seen'" in said


@pytest.fixture
def inspected(base_model, base_clip, other, photographed):
    bound, seen, vision = photographed
    model, clip = apply_subject(base_model, base_clip, bound, placeholder="<person>")
    model, clip = apply_subject(model, clip, other, placeholder="<dog>", class_word="dog")
    model, recording = record_model(model)
    sample(model, encode(clip, "<person> walking a <dog>"), encode(clip, "bad"), latent=noise(size=(8, 4)))

    def make(subject=bound, layers="", points=((0.2, 0.3), (1.0, 1.0)), **photos):
        photos = photos or {"photos": seen, "clip_vision": vision}
        return inspect(recording, subject, torch.rand(1, 64, 32, 3), layers=layers, points=list(points), **photos)

    return make


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_drawn(inspected, view):
    x = inspected().draw(view)
    assert x.shape[0] == 1 and x.shape[3] == 3 and min(x.shape[1:3]) > 300
    assert len((x[0, ::4, ::4] * 15).round().flatten(0, 1).unique(dim=0)) > 20


def test_a_sheet_has_the_first_photo_and_the_owners(inspected, photographed):
    """The owners where there are several subjects."""
    chosen = inspected(layers="middle")
    overview = figures.overview(photographed[1][0], chosen.picture, chosen.points)
    sheet = chosen.draw("sheet")[0, :, drawing.GAP :]
    for section in map(drawing.to_tensor, (overview, chosen.section("owners", None))):
        height, width, _ = section.shape
        assert any(torch.equal(sheet[y : y + height, :width], section) for y in range(len(sheet) - height))


def test_first_and_last_are_among_the_few():
    assert spread(range(20), 6) == [0, 4, 8, 11, 15, 19] and spread(range(6), 6) == [*range(6)]


def test_chosen_layers_are_drawn(inspected):
    """By parts of their names: all views show these alone, each subject's attention as the mean of its maps there."""
    chosen = inspected(layers="middle")
    record = chosen.recording.record
    middle = [n for n, label in record.labels.items() if label.startswith("middle")]
    assert chosen.layers == chosen.kept == middle and len(middle) == 2 < len(record.labels)
    (_, steps), (_, layers) = chosen.attention("attention", None)
    assert [label for label, _ in steps] == ["mean of all", "step 1 of 2", "step 2 of 2"]
    assert [label for label, _ in layers] == [record.labels[n] for n in middle]
    names, means = chosen.everyone()
    assert names == ["<person>", "<dog>"]
    for subject, mean in enumerate(means):
        maps = {(step, n): record.maps[step, n, subject] for step in (1, 2) for n in middle}
        torch.testing.assert_close(mean, sum(maps.values()) / 4)
        if subject == chosen.number:
            torch.testing.assert_close(steps[0][1], mean)
            torch.testing.assert_close(steps[2][1], (maps[2, middle[0]] + maps[2, middle[1]]) / 2)
            torch.testing.assert_close(layers[1][1], (maps[1, middle[1]] + maps[2, middle[1]]) / 2)


def test_what_a_view_lacks_is_said(inspected, person):
    without = inspected(photos=None)
    assert without.draw("sheet").shape[0] == 1 and "Connect photo and clip_vision" in without.looked_at[1]
    with pytest.raises(ValueError, match="Connect photo and clip_vision to see"):
        without.draw("photo")
    fewer = inspected(photos=torch.rand(3, 32, 32, 3), clip_vision=make_clip_vision())
    assert fewer.draw("sheet").shape[0] == 1
    with pytest.raises(ValueError, match="of 3 photos come 36"):
        fewer.draw("photo")
    with pytest.raises(ValueError, match="at least one point"):
        inspected(points=()).draw("points")
    with pytest.raises(ValueError, match="No recorded layer's name holds '64x64'. There are: input 1.0"):
        inspected(layers="64x64")
    with pytest.raises(ValueError, match="holds <person>, <dog>, but not this subject"):
        inspected(subject=person)


def test_a_picture_of_another_shape_is_refused(applied, person):
    model, clip = applied
    model, recording = record_model(model)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"), latent=noise(size=(8, 4)))
    inspect(recording, person, torch.rand(1, 64, 32, 3), layers="", points=[])
    with pytest.raises(ValueError, match="latents of 4 x 8, the picture has 64 x 64: another shape"):
        inspect(recording, person, torch.rand(1, 64, 64, 3), layers="", points=[])


def test_text_of_the_recorded_prompt_stays(applied):
    """Recording adds nothing to the conditioning."""
    model, clip = applied
    positive = encode(clip, PROMPT)
    before = text_of(positive).clone()
    run(guide(record_model(model)[0], positive, encode(clip, "bad")))
    assert torch.equal(text_of(positive), before)
