"""What a run says of subjects that it cannot draw as they were meant."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import pytest
import torch
from sampling import PROMPT, encode, sample
from small_models import make_adapter, make_subject

from nested_attention.host import run
from nested_attention.host.adapters import load_adapter, read_weights
from nested_attention.host.apply import apply_subject
from nested_attention.host.images import check_mask
from nested_attention.host.images import encode as encode_photo
from nested_attention.host.prompt_info import describe_prompt
from nested_attention.host.run import AppliedSubject, Run


@pytest.fixture
def couple(applied, other):
    return apply_subject(*applied, other, placeholder="<dog>", class_word="dog")


def test_a_chain_that_was_wired_wrongly(applied, couple, base_model, other, caplog):
    """The prompt knows both subjects, the model one of them."""
    missed, _ = apply_subject(base_model, couple[1], other, placeholder="<cat>", class_word="cat")
    for model, strange in ((applied[0], "<dog>"), (missed, "<dog>, <person>")):
        caplog.clear()
        sample(model, encode(couple[1], "<person> walking a <dog>"), encode(couple[1], "bad"))
        assert f"The prompt holds {strange}, whose subject this model does not have" in caplog.text
    caplog.clear()
    without_strength = apply_subject(*applied, other, placeholder="<dog>", class_word="dog", strength=0.0)
    for model, clip in (couple, without_strength):
        sample(model, encode(clip, "<person> walking a <dog>"), encode(clip, "bad"))
    assert "does not have" not in caplog.text


def test_a_subject_in_the_negative_prompt_alone(applied, monkeypatch):
    said = []
    monkeypatch.setattr(run, "show", lambda text, node_id: said.append(text))
    model, clip = applied
    for texts, alone in ((("a park", PROMPT), True), ((PROMPT, PROMPT), False), ((PROMPT, "bad"), False)):
        said.clear()
        sample(model, *(encode(clip, text) for text in texts))
        assert ("in the negative prompt alone" in said[0]) is alone and "<person> stands in the" in said[0]


@pytest.mark.parametrize(
    ("choice", "sigmas", "idle"),
    [
        ({"end_percent": 0.5}, [2.0, 0.5, 0.0], False),
        ({"end_percent": 0.5}, [0.5, 0.25, 0.0], True),
        ({"start_percent": 0.5}, [2.0, 0.5, 0.0], False),
        ({"start_percent": 0.5}, [2.0, 1.5, 0.0], True),  # at the last sigma nothing is drawn
    ],
)
def test_a_pass_beyond_a_subjects_steps(base_model, base_clip, person, monkeypatch, choice, sigmas, idle):
    """Sigmas as parts of that at half of the steps."""
    said = []
    monkeypatch.setattr(run, "show", lambda text, node_id: said.append(text))
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>", **choice)
    model, clip = apply_subject(model, clip, person, placeholder="<absent>", **choice)
    half = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    sample(model, encode(clip, PROMPT), encode(clip, "bad"), sigmas=half * torch.tensor(sigmas))
    assert said[0] == "<person> stands in the prompt."
    idle_ones = [text for text in said if "None of this sampler's steps lies within" in text]
    assert len(idle_ones) == idle and not any("<absent>'s" in text for text in idle_ones)  # who is not there at all


def test_an_empty_socket_is_named(base_model, base_clip, person):
    """As a checkpoint gives that holds no text encoders."""
    for call in (
        lambda: apply_subject(None, base_clip, person, placeholder="<anna>"),
        lambda: apply_subject(base_model, None, person, placeholder="<anna>"),
        lambda: describe_prompt(None, "a person"),
        lambda: encode_photo(None, torch.rand(1, 8, 8, 3), None, "pad", person.adapter.config),
    ):
        with pytest.raises(ValueError, match="is empty: the file that its loader read holds none.* Load one with Load"):
            call()


def test_a_mask_of_another_picture(caplog):
    images, wide, none = torch.rand(1, 64, 64, 3), torch.ones(1, 64, 96), torch.full((1, 48, 64), 0.004)
    for mask, said in ((wide, True), (wide[..., :64], False), (none, False), (None, False)):
        caplog.clear()
        check_mask(mask, images, None)
        assert ("The mask is of another shape" in caplog.text) is said


@pytest.mark.parametrize("error", [MemoryError, PermissionError])
def test_what_is_no_fault_of_the_file_is_not_told_as_one(monkeypatch, error):
    def fail(*_, **__):
        raise error("said so")

    monkeypatch.setattr("comfy.utils.load_torch_file", fail)
    with pytest.raises(error, match="said so"):
        read_weights("a.safetensors")


def test_an_adapter_that_was_loaded_twice_goes_to_the_device_once(base_model, sites, tmp_path, monkeypatch):
    """As by two Load Subject nodes."""
    path = make_adapter(tmp_path / "one.safetensors", sites)
    loaded = [load_adapter(str(path), path.name) for _ in range(2)]
    tokens = [make_subject(adapter).subject.tokens for adapter in loaded]
    asked, load = [], comfy.model_management.load_models_gpu

    def ask(models, memory_required):
        asked.append((len(models), memory_required))
        load(models, memory_required=memory_required)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", ask)
    each = 2 * 4 * tokens[0].shape[1] * sum(site.inner for site in sites)  # keys and values in fp32
    for low_memory, kept in (((False, False), 2), ((True, False), 1), ((True, True), 0)):
        chosen = zip("ab", tokens, loaded, low_memory, strict=True)
        made = Run(base_model, [AppliedSubject(n, t, a, low_memory=low) for n, t, a, low in chosen])
        assert asked.pop() == (1, kept * each) and not asked
        assert len(made.pairs) == 2 * len(made.sites)


def test_competition_counts_where_its_own_subject_is_absent(base_model, base_clip, person, other):
    """The largest in the chain counts for all."""

    def drawn(competition, strength=1.0):
        model, clip = apply_subject(base_model, base_clip, person, placeholder="<anna>")
        model, clip = apply_subject(model, clip, other, placeholder="<bob>")
        third = replace(person, subject=other.subject)
        model, clip = apply_subject(model, clip, third, placeholder="<pet>", competition=competition, strength=strength)
        return sample(model, encode(clip, "<anna> and <bob>"), encode(clip, "bad"))

    assert not torch.allclose(drawn(3.0), drawn(0.0), rtol=1e-2)
    assert torch.equal(drawn(3.0, strength=0.0), drawn(3.0))
