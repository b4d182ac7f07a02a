"""What users read when something is wrong: our words, at the node where it can be known first."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from served import change, ids, pixels_of, texts_on_nodes

from scripts.client import NodeError

LOAD, APPLY = "NestedAttentionLoadAdapter", "NestedAttentionApplySubject"


def failure(studio, prompt):
    with pytest.raises(NodeError) as caught:
        studio.client.run(prompt)
    return caught.value


def test_an_adapter_for_another_base_model(studio):
    prompt = studio.prompt("one_subject_sd15")
    change(prompt, LOAD, adapter_name="generated-person-sdxl.safetensors")
    error = failure(studio, prompt)
    assert [error.node_id] == ids(prompt, APPLY)
    assert "'generated-person-sdxl.safetensors' was made for SDXL (70 cross-attention layers" in error.message
    assert "the model is Stable Diffusion 1.5 (16 cross-attention layers" in error.message
    assert "Load the adapter that was made for this base model" in error.message


def test_a_placeholder_that_is_taken(studio):
    prompt = studio.prompt("two_subjects_sdxl")
    second = change(prompt, APPLY, 1, placeholder="<anna>")
    error = failure(studio, prompt)
    assert error.node_id == second
    assert "The placeholder <anna> is already taken" in error.message


def test_a_class_word_of_two_tokens(studio):
    prompt = studio.prompt("one_subject_sd15")
    apply = change(prompt, APPLY, class_word="fire truck")
    error = failure(studio, prompt)
    assert error.node_id == apply
    assert "'fire truck' is 2 ('fire' + 'truck')" in error.message


WRONG_FILES = {
    "a_lora.safetensors": "it holds no Q-Former",
    "half.safetensors": "half.safetensors",
    "page.safetensors": "page.safetensors",
    "list.bin": "only tensors",
}


@pytest.fixture(scope="module")
def wrong_files(folder):
    place = folder / "nested_attention"
    save_file({"lora_unet_down.weight": torch.zeros(4, 4)}, place / "a_lora.safetensors")
    content = (place / "a_lora.safetensors").read_bytes()
    (place / "half.safetensors").write_bytes(content[: len(content) // 2])
    (place / "page.safetensors").write_text("<!DOCTYPE html><html>Please log in</html>" * 100)
    torch.save({"epoch": [1, 2]}, place / "list.bin")


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file(studio, wrong_files, name):
    prompt = studio.prompt("one_subject_sd15")
    load = change(prompt, LOAD, adapter_name=name)
    error = failure(studio, prompt)
    assert error.node_id == load
    assert WRONG_FILES[name] in error.message


def test_an_adapter_file_that_is_not_there(studio):
    prompt = studio.prompt("one_subject_sd15")
    load = change(prompt, LOAD, adapter_name="gone.safetensors")
    error = failure(studio, prompt)
    assert (error.node_id, error.kind) == (load, "value_not_in_list")
    assert "gone.safetensors" in error.message


def test_a_subject_whose_adapter_is_gone(studio, folder):
    place = folder / "nested_attention_subjects"
    metadata = {"format": "nested_attention_subject", "adapter": "0" * 16, "adapter_name": "gone.safetensors"}
    save_file({"tokens": torch.zeros(1, 4, 768)}, place / "lost.safetensors", metadata)
    prompt = studio.prompt("load_subject")
    load = change(prompt, "NestedAttentionLoadSubject", subject_name="lost.safetensors")
    error = failure(studio, prompt)
    assert error.node_id == load
    assert "'gone.safetensors', is not in models/nested_attention" in error.message


def test_a_placeholder_in_no_prompt_is_a_warning_on_the_node(studio, reference):
    prompt = copy.deepcopy(reference[0])
    text = "a person holding a plate of pasta"
    change(prompt, "CLIPTextEncode", text=text)
    with texts_on_nodes(studio.client) as (listener, shown):
        number = listener.queue(prompt)
        studio.client.wait(number)  # whose own connection is another
    picture = pixels_of(studio.client.images(number)[0])
    ((node_id, warning),) = ((node_id, text) for node_id, text in shown if "prompt" in text)
    assert [node_id] == ids(prompt, APPLY)
    assert "person" in warning and "does not show its subject" in warning

    (apply,) = ids(prompt, APPLY)
    (loader,) = ids(prompt, "CheckpointLoaderSimple")
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if value in ([apply, 0], [apply, 1]):
                node["inputs"][name] = [loader, value[1]]
    del prompt[apply]
    assert np.array_equal(studio.draw(prompt), picture)
