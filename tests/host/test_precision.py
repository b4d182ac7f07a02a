"""Base models and adapters of any precision, as users have them."""

from __future__ import annotations

import pytest
import torch
from sampling import PROMPT, SIGMAS, encode, sample
from small_models import make_adapter, make_model, make_subject
from torch.nn.functional import cosine_similarity

from nested_attention.adapter import NestedAdapter
from nested_attention.files import read_adapter, write_adapter
from nested_attention.host.adapters import load_adapter
from nested_attention.host.apply import apply_subject
from nested_attention.host.run import Run

BASES = {
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16 computed in fp32": (torch.float16, torch.float32),
    "fp8 computed in fp32": (torch.float8_e4m3fn, torch.float32),
    "fp8 computed in bf16": (torch.float8_e4m3fn, torch.bfloat16),
}


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def precision(request):
    return request.param


@pytest.fixture
def adapter_of(precision, tmp_path, sites):
    adapter = read_adapter(make_adapter(tmp_path / "fp32.safetensors", sites))
    write_adapter(adapter.to(precision), tmp_path / "adapter.safetensors")
    return load_adapter(str(tmp_path / "adapter.safetensors"), "adapter.safetensors")


@pytest.mark.parametrize("base", BASES)
def test_base_models(base_clip, adapter_of, base):
    """The change that the subject makes in a step is that of the same weights computed in full precision."""
    stored, computed = BASES[base]
    half, full = make_model(stored, computed), make_model()
    for mine, theirs in zip(full.model.parameters(), half.model.parameters(), strict=True):
        mine.data = theirs.data.to(mine.dtype)
    changes = []
    for model in (half, full):
        applied, clip = apply_subject(model, base_clip, make_subject(adapter_of), placeholder="<person>")
        positive, negative = encode(clip, PROMPT), encode(clip, "bad")
        with_subject, without = (sample(m, positive, negative, sigmas=SIGMAS[:2]) for m in (applied, model))
        changes.append((with_subject - without).flatten())
    assert changes[0].isfinite().all()
    assert cosine_similarity(*changes, dim=0) > (0.9999 if computed == torch.float32 else 0.97)


def test_adapters_keep_their_precision_in_memory(adapter_of, precision):
    model: NestedAdapter = adapter_of.patcher.model
    assert {p.dtype for p in model.parameters()} == {precision}
    tokens = make_subject(adapter_of).subject.tokens
    assert tokens.dtype == torch.float32 and tokens.isfinite().all()


def test_the_precision_that_another_node_chose(base_model):
    """It stands in a patch until the model is loaded, which is after the nested keys and values are projected."""
    model = base_model.clone()
    model.add_object_patch("manual_cast_dtype", torch.bfloat16)
    assert (Run(base_model, []).dtype, Run(model, []).dtype) == (torch.float32, torch.bfloat16)
