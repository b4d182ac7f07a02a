"""Other packs at the same attention layers: their effect stays, ours is added, in whatever order they come."""

from __future__ import annotations

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from equations import Stands, expected_model
from sampling import PROMPT, check, close, encode, guide, run, sample, text_of

from nested_attention.host import KEY
from nested_attention.host.apply import apply_subject
from nested_attention.host.recording import record_model


class IdentityPatch:
    """Another identity pack's patch object, in the convention of that field: it adds, and lets others `.add`."""

    def __init__(self, callback, **kwargs):
        self.callbacks = [(callback, kwargs)]

    def add(self, callback, **kwargs):
        self.callbacks.append((callback, kwargs))

    def __call__(self, q, k, v, extra_options):
        out = host_attention.optimized_attention(q, k, v, extra_options["n_heads"])
        for callback, kwargs in self.callbacks:
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


def drift(out, q, k, v, extra_options, amount):
    return amount * torch.tanh(q)


def with_identity_pack(model, sites, amount, keys=lambda site: site.key):
    """As that pack patches: a new object at each key, or `.add` where there is one."""
    model = model.clone()
    there = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for site in sites:
        key = keys(site)
        if key in there:
            there[key].add(drift, amount=amount)
        else:
            model.set_model_attn2_replace(IdentityPatch(drift, amount=amount), *key)
    return model


@pytest.fixture
def plain_expected(base_model, sites):
    """The equations plus that pack's addition."""

    def make(texts):
        model = expected_model(base_model, sites, texts)
        patches = model.model_options["transformer_options"]["patches_replace"]["attn2"]
        for key, attend in list(patches.items()):
            patches[key] = lambda q, k, v, o, attend=attend: attend(q, k, v, o) + drift(None, q, k, v, o, 0.3)
        return model

    return make


@pytest.mark.parametrize("keys", ["each transformer", "each block"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_identity_pack(base_model, base_clip, sites, person, plain_expected, order, keys):
    key = (lambda site: site.key) if keys == "each transformer" else (lambda site: site.key[:2])
    chosen = sites if keys == "each transformer" else list({site.key[:2]: site for site in sites}.values())
    if order == "before":
        base = with_identity_pack(base_model, chosen, 0.3, key)
        model, clip = apply_subject(base, base_clip, person, placeholder="<person>")
    else:
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>")
        model = with_identity_pack(model, chosen, 0.3, key)
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    expected = plain_expected([(text_of(positive), [Stands(person, (2,))])])
    close(sample(model, positive, negative), sample(expected, positive, negative))


def test_identity_pack_between_two_subjects(base_model, base_clip, sites, person, other, plain_expected):
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>")
    model = with_identity_pack(model, sites, 0.3)
    model, clip = apply_subject(model, clip, other, placeholder="<dog>", class_word="dog")
    positive, negative = encode(clip, "<person> and <dog>"), encode(clip, "bad")
    expected = plain_expected([(text_of(positive), [Stands(person, (1,)), Stands(other, (3,))])])
    close(sample(model, positive, negative), sample(expected, positive, negative))


def test_pack_that_adds_to_our_patch_while_sampling(applied, base_model, sites, person, plain_expected):
    """Our patch stands at the layers only during a run; whoever finds it there can add to it as to any other."""
    model, clip = applied

    def late(executor, *args, **kwargs):
        for patch in executor.class_obj.model_options["transformer_options"]["patches_replace"]["attn2"].values():
            patch.add(drift, amount=0.3)
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("outer_sample", "late", late)
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    expected = sample(plain_expected([(text_of(positive), [Stands(person, (2,))])]), positive, negative)
    for _ in range(2):
        close(sample(model, positive, negative), expected)


def test_their_stored_tensors_stay_untouched(applied, base_model, sites):
    """A patch may hand out a tensor that it keeps."""
    model, clip = applied
    kept = {}

    def constant(_, q, *args, **kwargs):
        return kept.setdefault(q.shape, torch.ones_like(q))

    def patch(q, k, v, extra_options):
        assert KEY not in extra_options
        return constant(None, q)

    patched, overridden = model.clone(), model.clone()
    patched.set_model_attn2_replace(patch, *sites[0].key)
    overridden.model_options["transformer_options"]["optimized_attention_override"] = constant
    for each in (patched, overridden):
        sample(each, encode(clip, PROMPT), encode(clip, "bad"))
        assert all(torch.equal(x, torch.ones_like(x)) for x in kept.values())


def test_attention_override_is_kept(applied, base_model, sites, person, monkeypatch):
    """The user's choice of attention, as a backend override, serves the text attention of every layer."""
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)
    model, clip = applied
    calls = []

    def override(function, *args, **kwargs):
        calls.append(kwargs.get("transformer_options", {}).get("block"))
        return host_attention.attention_basic(*args, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    check(model, base_model, sites, [(text_of(positive), [Stands(person, (2,))])], positive, negative)
    assert len(calls) == 2 * 2 * len(sites) and None not in calls  # self- and cross-attention in two steps


@pytest.mark.parametrize("backend", ["attention_pytorch", "attention_split", "attention_sub_quad", "attention_basic"])
def test_every_backend(applied, base_model, sites, person, backend, monkeypatch):
    model, clip = applied
    monkeypatch.setattr(host_attention, "optimized_attention", getattr(host_attention, backend))
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    check(model, base_model, sites, [(text_of(positive), [Stands(person, (2,))])], positive, negative)


def test_attention_is_called_as_the_host_calls_it(applied, base_model, monkeypatch):
    """The user's choice of attention, in the precision that the layer asks for."""
    calls = []

    def attention(q, k, v, heads, attn_precision=None, transformer_options=None, **kwargs):
        calls.append((q.shape, k.shape, heads, attn_precision, transformer_options["block"], kwargs))
        return host_attention.attention_basic(q, k, v, heads, **kwargs)

    monkeypatch.setattr(host_attention, "optimized_attention", attention)
    for module in base_model.model.diffusion_model.modules():
        if hasattr(module, "attn_precision"):
            monkeypatch.setattr(module, "attn_precision", torch.float32)
    model, clip = applied
    conditionings = encode(clip, PROMPT), encode(clip, "bad")
    calls.clear()  # those of the text encoders
    sample(model, *conditionings)
    ours = calls.copy()
    calls.clear()
    sample(base_model, *conditionings)
    assert ours == calls and {call[3] for call in calls} == {torch.float32}


def test_rows_without_subject_are_the_hosts_bit_for_bit(applied, base_model, monkeypatch):
    """With the host's fused kernel, the negative's prediction is the very tensor of an unpatched model."""
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)
    monkeypatch.setattr(host_attention, "optimized_attention_masked", host_attention.attention_pytorch)
    model, clip = applied
    negatives = {}
    for name, each in (("ours", model.clone()), ("plain", base_model.clone())):
        each.set_model_sampler_post_cfg_function(
            lambda args, name=name: negatives.setdefault(name, args["uncond_denoised"].clone()) * 0 + args["denoised"]
        )
        sample(each, encode(clip, PROMPT), encode(clip, "bad"))
    assert torch.equal(negatives["ours"], negatives["plain"])


def rearranged(model, rows=1, columns=1):
    """A pack that multiplies rows (regional prompts) or interleaves key and value columns in attention."""
    model = model.clone()

    def patch(n, context, value, extra_options):
        return n.repeat(rows, 1, 1), context.repeat(rows, columns, 1), value.repeat(rows, columns, 1)

    def undo(n, extra_options):
        return n.chunk(rows)[0]

    model.set_model_attn2_patch(patch)
    model.set_model_attn2_output_patch(undo)
    return model


@pytest.mark.parametrize("change", [{"rows": 2}, {"columns": 2}])
def test_rearranged_attention_is_left_alone(applied, base_model, change, caplog):
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    out = sample(rearranged(model, **change), positive, negative)
    close(out, sample(rearranged(base_model, **change), positive, negative))
    assert caplog.text.count("rearranges attention") == 1
    assert "not reached" not in caplog.text


def with_fewer_places(model):
    """A pack that merges tokens of the picture in cross-attention."""
    model = model.clone()
    model.set_model_attn2_patch(lambda n, context, value, extra: (n[:, ::2], context, value))
    model.set_model_attn2_output_patch(lambda n, extra: n.repeat_interleave(2, dim=1))
    return model


def test_merged_places(applied, base_model, base_clip, person, caplog):
    """A subject shows there all the same; one with a region, which cannot be told from the rest, does not."""
    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    out = sample(with_fewer_places(model), positive, negative)
    plain = sample(with_fewer_places(base_model), positive, negative)
    assert "rearranges" not in caplog.text and not torch.allclose(out, plain, rtol=1e-2)
    recorded, recording = record_model(with_fewer_places(model))
    torch.testing.assert_close(sample(recorded, positive, negative), out, rtol=0, atol=0)
    assert (
        recording.summary()
        == "Nothing was recorded. Another node merges places of the picture, which cannot be recorded."
    )
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", region=torch.ones(1, 4, 4))
    close(sample(with_fewer_places(model), encode(clip, PROMPT), encode(clip, "bad")), plain)
    assert caplog.text.count("rearranges attention to 8 places of the picture where it has 16") == 1


def test_layers_that_another_node_takes_over_are_named(applied, sites, caplog):
    model, clip = applied

    def takeover(executor, *args, **kwargs):
        options = executor.class_obj.model_options["transformer_options"]["patches_replace"]["attn2"]
        options[sites[3].key] = lambda q, k, v, extra: q
        return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("outer_sample", "takeover", takeover)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert caplog.text.count("1 of") == 1 and str(sites[3]) in caplog.text


def test_every_layer_once_and_none_twice(applied, sites, monkeypatch):
    from nested_attention.host.patch import LayerPatch

    seen = []
    original = LayerPatch.attend_personalized
    monkeypatch.setattr(
        LayerPatch, "attend_personalized", lambda self, *args: seen.append(self.index) or original(self, *args)
    )
    model, clip = applied
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert sorted(seen) == sorted([*range(len(sites))] * 2)


def test_nothing_happens_inside_a_controlnet(applied, base_model, sites, person):
    """A ControlNet has a UNet of its own with the same text: no layer of it is personalised."""
    from small_models import make_controlnet

    model, clip = applied
    positive, negative = encode(clip, PROMPT), encode(clip, "bad")
    texts = [(text_of(positive), [Stands(person, (2,))])]
    control = make_controlnet().copy().set_cond_hint(torch.rand(1, 3, 32, 32), 0.7, (0.0, 1.0))
    with_control = [
        [[c[0], {**c[1], "control": control, "control_apply_to_uncond": False}]] for c in (positive[0], negative[0])
    ]
    actual = run(guide(model, *with_control))
    close(actual, run(guide(expected_model(base_model, sites, texts), *with_control)))
    assert not torch.allclose(actual, sample(model, positive, negative), rtol=1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_follows_what_changes(base_model, base_clip, person):
    """The host compiles without guards on what patches read, so that all of it would stay as it was traced."""
    torch._dynamo.reset()

    def drawn(prompt, compiled, **choices):
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", **choices)
        if compiled:
            [model] = TorchCompileModel.execute(model, "eager").args
        return sample(model, encode(clip, prompt), encode(clip, "bad"))

    for prompt, choices in (
        (PROMPT, {}),
        (PROMPT, {"strength": 0.4}),
        ("in a park a <person>", {}),
        (PROMPT, {"start_percent": 0.5}),
    ):
        close(drawn(prompt, True, **choices), drawn(prompt, False, **choices))


def test_compiled_code_is_left_out_for_the_length_of_a_run(applied):
    """That is a setting of the process: threads of several GPUs that each changed it would leave it changed."""
    model, clip = applied
    found, model = [], model.clone()

    def between(args):
        found.append(torch._dynamo.eval_frame._stance.stance)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(between)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    assert set(found) == {"force_eager"} and torch._dynamo.eval_frame._stance.stance == "default"


def test_a_pytorch_that_cannot_leave_compiled_code_out(applied, monkeypatch):
    model, clip = applied
    monkeypatch.delattr(torch.compiler, "set_stance")
    sample(model, encode(clip, PROMPT), encode(clip, "bad"))
    [model] = TorchCompileModel.execute(model, "eager").args
    with pytest.raises(RuntimeError, match=r"PyTorch 2\.6 or newer.*Bypass the node"):
        sample(model, encode(clip, PROMPT), encode(clip, "bad"))
