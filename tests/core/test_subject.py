"""Subjects: joined, combined, saved and loaded."""

import pytest
import torch
from safetensors.torch import save_file

from nested_attention.subject import Subject, combine, join_photos, load_subject, save_subject

A = Subject(torch.randn(1, 4, 8), "f1", "person.safetensors")
B = Subject(torch.randn(1, 4, 8), "f1", "person.safetensors")


def test_join():
    photos = torch.randn(3, 4, 8)
    assert torch.equal(join_photos(photos, "concatenate"), torch.cat([*photos])[None])
    assert torch.equal(join_photos(photos, "average"), photos.mean(0, keepdim=True))


def test_combine():
    assert torch.equal(combine(A, B, "concatenate", 0.5).tokens, torch.cat([A.tokens, B.tokens], dim=1))
    assert torch.equal(combine(A, B, "blend", 0.0).tokens, A.tokens)
    torch.testing.assert_close(combine(A, B, "blend", 1.0).tokens, B.tokens)
    torch.testing.assert_close(combine(A, B, "blend", 0.25).tokens, 0.75 * A.tokens + 0.25 * B.tokens)
    half = Subject(B.tokens.half(), "f1")  # as an adapter on a GPU may make it
    assert (
        combine(A, half, "blend", 0.5).tokens.dtype
        == combine(A, half, "concatenate", 0.5).tokens.dtype
        == torch.float32
    )
    with pytest.raises(ValueError, match="different adapters"):
        combine(A, Subject(B.tokens, "f2", "dog.safetensors"), "blend", 0.5)
    with pytest.raises(ValueError, match="these have 4 and 8"):
        combine(A, Subject(torch.randn(1, 8, 8), "f1"), "blend", 0.5)


def test_round_trip(tmp_path):
    save_subject(A, tmp_path / "anna.safetensors")
    loaded = load_subject(tmp_path / "anna.safetensors")
    assert torch.equal(loaded.tokens, A.tokens) and (loaded.adapter, loaded.adapter_name) == (
        "f1",
        "person.safetensors",
    )


def test_saved_on_windows(tmp_path):
    save_subject(Subject(A.tokens, "f1", "faces\\person.safetensors"), tmp_path / "a.safetensors")
    assert load_subject(tmp_path / "a.safetensors").adapter_name == "faces/person.safetensors"


@pytest.mark.parametrize(
    "tokens",
    [
        torch.ones(4, 8),
        torch.ones(2, 4, 8),
        torch.ones(1, 0, 8),
        torch.ones(1, 4, 8).int(),
        torch.full((1, 4, 8), torch.nan),
    ],
)
def test_tokens_of_no_subject(tmp_path, tokens):
    metadata = {"format": "nested_attention_subject", "adapter": "f1", "adapter_name": "a"}
    save_file({"tokens": tokens}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read as a saved subject: its tokens are"):
        load_subject(tmp_path / "a.safetensors")
    save_file({"tokens": torch.ones(1, 4, 8)}, tmp_path / "b.safetensors", {"format": metadata["format"]})
    with pytest.raises(ValueError, match="cannot be read as a saved subject: 'adapter"):
        load_subject(tmp_path / "b.safetensors")


def test_not_a_subject(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no saved subject .*weight"):
        load_subject(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        load_subject(tmp_path / "cut.safetensors")
