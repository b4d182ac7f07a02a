"""Nothing of the incoming model changes, nothing piles up, nothing outlives its run."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from sampling import PROMPT, bare_encode, encode, sample

from nested_attention.host import adapters
from nested_attention.host.apply import apply_subject
from nested_attention.host.run import AppliedSubject, Run


def snapshot(options):
    if isinstance(options, dict):
        return {key: snapshot(value) for key, value in options.items()}
    return [*map(snapshot, options)] if isinstance(options, list) else id(options)


def test_the_incoming_model_and_clip_are_untouched(base_model, base_clip, person):
    before = snapshot(base_model.model_options), snapshot(base_model.wrappers), dict(base_clip.patcher.object_patches)
    tokenizer = base_clip.tokenizer
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>")
    options = snapshot(model.model_options)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    after = snapshot(base_model.model_options), snapshot(base_model.wrappers), dict(base_clip.patcher.object_patches)
    assert before == after and base_clip.tokenizer is tokenizer
    assert snapshot(model.model_options) == options


def test_queued_three_times_with_a_changed_strength(base_model, base_clip, person):
    """As the host re-runs a graph: the loaders' outputs are cached, the apply node runs anew."""

    def queue(strength):
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", strength=strength)
        return sample(model, encode(clip, PROMPT), encode(clip, "bad"))

    first, changed, again = queue(1.0), queue(0.4), queue(1.0)
    assert torch.equal(first, again) and not torch.allclose(first, changed, rtol=1e-2)
    assert torch.equal(
        queue(0.0), sample(base_model, encode(base_clip, "a person in a park"), encode(base_clip, "bad"))
    )


def test_same_model_sampled_three_times(applied):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    results = [sample(model, positive, negative) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bypassed_is_the_host(applied, base_model, base_clip):
    plain = encode(base_clip, "a person in a park"), encode(base_clip, "bad")
    before = sample(base_model, *plain)
    model, clip = applied
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert torch.equal(sample(base_model, *plain), before)


def test_interrupted_run_leaves_no_trace(applied):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    expected = sample(model, positive, negative)
    interrupted = model.clone()

    def interrupt(executor, *args, **kwargs):
        executor(*args, **kwargs)
        raise comfy.model_management.InterruptProcessingException()

    interrupted.add_wrapper_with_key("apply_model", "interrupt", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(interrupted, positive, negative)
    assert torch.equal(sample(model, positive, negative), expected)


def test_a_pack_that_samples_several_times_in_one_run(applied, base_model, base_clip, person, caplog):
    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    base = base_model.clone()
    base.add_wrapper_with_key("outer_sample", "twice", twice)
    model, clip = apply_subject(base, base_clip, person, placeholder="<person>")
    expected = sample(applied[0], *(encode(applied[1], text) for text in (PROMPT, "bad")))
    for encoded in (encode, bare_encode):
        assert torch.equal(sample(model, encoded(clip, PROMPT), encoded(clip, "bad")), expected)
    assert "Nested Attention" not in caplog.text


def test_interrupt_while_projecting(applied, monkeypatch):
    """Before any layer is: operations of the host look for it too, but only once one has begun."""
    counted = count_projections(monkeypatch)
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, positive, negative)
    assert counted == []


def test_projected_once_a_run(applied, sites, monkeypatch):
    counted = count_projections(monkeypatch)
    model, clip = applied
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert sorted(counted) == [*range(len(sites))]


def count_projections(monkeypatch):
    layers = []
    original = adapters.nested_pair
    monkeypatch.setattr(
        "nested_attention.host.run.nested_pair",
        lambda adapter, layer, *rest: layers.append(layer) or original(adapter, layer, *rest),
    )
    return layers


def test_low_memory_gives_the_same(base_model, base_clip, sites, person, monkeypatch):
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>")
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    expected = sample(model, positive, negative)
    low, _ = apply_subject(base_model, base_clip, person, placeholder="<person>", low_memory=True)
    counted = count_projections(monkeypatch)
    assert torch.equal(sample(low, positive, negative), expected)
    assert sorted(counted) == [*range(len(sites))]


def test_low_memory_keeps_nothing_on_the_models_device(base_model, person):
    """The device is torch's "meta", which computes nothing but takes no tensor of another one."""
    q = torch.empty(1, 2, 4, 32, device="meta")
    for low_memory in (False, True):
        run = Run(
            base_model, [AppliedSubject("<person>", person.subject.tokens, person.adapter, low_memory=low_memory)]
        )
        assert all(x.device.type == "meta" for x in run.nested(0, 0, q))
        kept_on = torch.device("cpu") if low_memory else person.adapter.patcher.load_device
        assert bool(run.copies) != low_memory and {x.device for pair in run.pairs.values() for x in pair} == {kept_on}


def test_the_host_manages_the_adapters_weights(base_model, base_clip, person):
    """The adapter is loaded in every run; unloading all frees it."""
    patcher = person.adapter.patcher
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>")
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert any(patcher.is_clone(loaded.model) for loaded in comfy.model_management.current_loaded_models)
    comfy.model_management.unload_all_models()
    assert not any(patcher.is_clone(loaded.model) for loaded in comfy.model_management.current_loaded_models)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
