"""Any text node understands the placeholder, and says clearly what it cannot place."""

from __future__ import annotations

import copy
import pickle
import sys
from types import SimpleNamespace

import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL
from sampling import encode, same_text
from small_models import make_adapter, make_subject

from nested_attention.host import marks
from nested_attention.host.adapters import load_adapter
from nested_attention.host.apply import apply_subject
from nested_attention.host.notice import show, warn
from nested_attention.host.prompt_info import describe_prompt
from nested_attention.host.text import SENTINELS
from nodes import CLIPTextEncode


@pytest.fixture
def clip(base_model, base_clip, person):
    return apply_subject(base_model, base_clip, person, placeholder="<person>")[1]


def apply(base_model, clip, person, **choices):
    return apply_subject(base_model, clip, person, **{"placeholder": "<anna>", **choices})[1]


def columns(conditioning):
    sections = conditioning[0][1]["nested_attention"]
    return [(i, mark.placeholder, mark.column, mark.weight) for i, s in enumerate(sections) for mark in s.marks]


@pytest.mark.parametrize(
    "text, place",
    [
        ("<person>", (1, 1.0)),
        ("a <person>, smiling", (2, 1.0)),
        ("the <person>'s hat", (2, 1.0)),
        ("(<person>:1.3) here", (1, 1.3)),
        ("((a <person>) here:0.5)", (2, 0.55)),
        ("zebra and tulip with <person>", (5, 1.0)),
        ("ZEBRA and Tulip with <person>", (5, 1.0)),
        ("x<person>y", (2, 1.0)),
    ],
)
def test_column(clip, text, place):
    ((section, placeholder, column, weight),) = columns(encode(clip, text))
    assert (section, placeholder, column) == (0, "<person>", place[0])
    assert weight == pytest.approx(place[1])


def test_core_text_nodes(clip):
    assert columns(CLIPTextEncode().encode(clip, "a <person>")[0]) == [(0, "<person>", 2, 1.0)]
    sdxl = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
    both = CLIPTextEncodeSDXL.execute(clip=clip, text_g="a <person> here", text_l="the <person>", **sdxl)[0]
    assert columns(both) == [(0, "<person>", 2, 1.0)]
    one = CLIPTextEncodeSDXL.execute(clip=clip, text_g="a <person>", text_l="", **sdxl)[0]
    assert columns(one) == [(0, "<person>", 2, 1.0)]
    with pytest.raises(ValueError, match="different columns .*CLIP-G: <person> at 2.*CLIP-L: <person> at 4"):
        CLIPTextEncodeSDXL.execute(clip=clip, text_g="a <person>", text_l="here is a <person>", **sdxl)


def test_word_ids_keep_their_form(clip):
    tokens = clip.tokenize("a <person>", return_word_ids=True)["l"][0]
    assert [len(t) for t in tokens[:4]] == [3, 3, 3, 3]


def test_whole_words_only(base_model, base_clip, person):
    clip = apply(base_model, base_clip, person, placeholder="anna")
    assert columns(encode(clip, "annabel, hanna and banana")) == []
    assert len(columns(encode(clip, "anna and annabel"))) == 1


@pytest.mark.parametrize("placeholder", ["[anna]", "$me", "anna+", "a.n*"])
def test_a_placeholder_of_signs(base_model, base_clip, person, placeholder):
    clip = apply(base_model, base_clip, person, placeholder=placeholder)
    assert columns(encode(clip, f"a {placeholder} here")) == [(0, placeholder, 2, 1.0)]


def test_longest_placeholder_wins(base_model, base_clip, person, other):
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<a>")
    _, clip = apply_subject(model, clip, other, placeholder="<a>b", class_word="dog")
    assert columns(encode(clip, "<a>b and <a>")) == [(0, "<a>b", 1, 1.0), (0, "<a>", 3, 1.0)]


def test_class_word(base_model, base_clip, person, tmp_path, sites):
    """The user's goes before the adapter's own."""
    path = make_adapter(tmp_path / "pet.safetensors", sites, class_word="dog")
    pet = make_subject(load_adapter(str(path), path.name))
    for given, word in (("woman", "woman"), ("", "dog")):
        clip = apply(base_model, base_clip, pet, class_word=given)
        assert same_text(encode(clip, "an <anna>"), encode(base_clip, f"an {word}"))
    with pytest.raises(ValueError, match=r"'firefighter girl' is 2 \('firefighter' \+ 'girl'\)"):
        apply(base_model, base_clip, person, class_word="firefighter girl")


@pytest.mark.parametrize("placeholder", ["", "two words", "a,b", "(a)", "x:y"])
def test_unusable_placeholder(base_model, base_clip, person, placeholder):
    with pytest.raises(ValueError, match="cannot be a placeholder"):
        apply(base_model, base_clip, person, placeholder=placeholder)


def test_taken_placeholder(base_model, base_clip, person, other):
    model, clip = apply_subject(base_model, base_clip, person, placeholder="<person>")
    with pytest.raises(ValueError, match="<person> is already taken"):
        apply_subject(model, clip, other, placeholder="<person>")
    with pytest.raises(ValueError, match="model already has a subject <person>"):
        apply_subject(model, base_clip, other, placeholder="<person>")


def test_survives_a_lora_loader(clip, base_clip):
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    weight = base_clip.cond_stage_model.state_dict()[key]
    patch = {key: ("diff", (torch.randn_like(weight),))}
    after, plain = clip.clone(), base_clip.clone()
    for each in (after, plain):
        assert each.add_patches(patch, 1.0) == [key]
    ours = encode(after, "a <person>")
    assert columns(ours) == [(0, "<person>", 2, 1.0)]
    assert same_text(ours, encode(plain, "a person"))
    assert not torch.equal(ours[0][0], encode(clip, "a <person>")[0][0])


def test_patched_and_plain_clip_take_turns(clip, base_clip):
    """The host patches one module for all clones: each must find its own function there."""
    for _ in range(2):
        assert columns(encode(clip, "a <person>")) == [(0, "<person>", 2, 1.0)]
        assert "nested_attention" not in encode(base_clip, "a <person>")[0][1]


class TestTextualInversion:
    """An embedding file for one encoder only, as SD 1.5 embeddings are: the other encoder drops its vectors."""

    @pytest.fixture
    def with_embedding(self, clip, tmp_path, monkeypatch):
        torch.save({"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}, tmp_path / "style.pt")
        for encoder, width in ((clip.tokenizer.clip_l, 32), (clip.tokenizer.clip_g, 64)):
            monkeypatch.setattr(encoder, "embedding_directory", [str(tmp_path)])
            monkeypatch.setattr(encoder, "embedding_size", width)
        return clip

    def test_after_the_subject_it_is_fine(self, with_embedding):
        assert columns(encode(with_embedding, "a <person> in embedding:style")) == [(0, "<person>", 2, 1.0)]

    def test_before_the_subject_it_is_an_error(self, with_embedding):
        with pytest.raises(ValueError, match="different columns .*an embedding before it"):
            encode(with_embedding, "embedding:style a <person>")

    def test_what_is_cut_off_is_shown(self, with_embedding, tmp_path):
        """A file may hold more vectors for one encoder than for the other."""
        torch.save({"clip_l": torch.randn(2, 32), "clip_g": torch.randn(1, 64)}, tmp_path / "uneven.pt")
        *kept, cut, _ = describe_prompt(with_embedding, "word " * 74 + "embedding:uneven").splitlines()
        assert len(kept) == 2 and "cut off" not in "".join(kept)
        assert cut == "CLIP-L section 2 (cut off: the other encoder's text is shorter): 1:[embedding] 2:[embedding]"


def test_learned_vectors(base_model, base_clip, tmp_path, sites):
    """An adapter may bring embeddings of its own for the token, which stand where the user gives no class word."""
    path = make_adapter(tmp_path / "learned.safetensors", sites, class_word="dog", embeddings={"l": 32, "g": 64})
    adapter = load_adapter(str(path), path.name)
    word = base_clip.tokenizer.clip_l.tokenizer("person")["input_ids"][1]
    for name, vector in adapter.patcher.model.embeddings.items():
        table = getattr(base_clip.cond_stage_model, f"clip_{name}").transformer.get_input_embeddings().weight
        vector.data = table[word].clone()
    for given, word in (("", "person"), ("woman", "woman")):
        ours = encode(apply(base_model, base_clip, make_subject(adapter), class_word=given), "a <anna> here")
        assert columns(ours) == [(0, "<anna>", 2, 1.0)]
        assert same_text(ours, encode(base_clip, f"a {word} here"))

    adapter.patcher.model.embeddings["g"].data = torch.zeros(32)  # which the host would drop, and move what follows
    with pytest.raises(ValueError, match="learned embedding for CLIP-G has 32 values.* takes 64"):
        apply(base_model, base_clip, make_subject(adapter), placeholder="<person>")


def test_a_prompt_without_a_word_to_spare(clip):
    with pytest.raises(ValueError, match="one less for each of these words in it: zebra.* This one has 1 "):
        encode(clip, f"a <person> with {' '.join(SENTINELS)}")


def test_cut_text(clip):
    """The host keeps as many tokens as the shorter of the two texts has."""
    tokens = clip.tokenize("word " * 80 + "<person>")
    tokens["l"] = tokens["l"][:1]
    with pytest.raises(ValueError, match="stands at token .* kept only 77"):
        clip.encode_from_tokens_scheduled(tokens)


def test_prompt_in_words(clip):
    assert describe_prompt(clip, "a (<person>:1.3), running zebras").splitlines() == [
        "CLIP-G section 1: 1:a 2:<person>(as person)*1.3 3:, 4:running 5:ze 6:bras",
        "CLIP-L section 1: 1:a 2:<person>(as person)*1.3 3:, 4:running 5:ze 6:bras",
        "Subjects: <person> at column 2 of section 1, strength 1.3",
    ]
    assert describe_prompt(clip, "").endswith("CLIP-L section 1: empty\nSubjects: none")
    # Its letters, where a token has whole ones.
    assert (
        describe_prompt(clip, "a caf\u00e9 \u5973").splitlines()[1]
        == "CLIP-L section 1: 1:a 2:caf\u00e9 3:\ufffd 4:\ufffd"
    )


def test_prompt_for_another_kind_of_encoder():
    class Tokenizer:
        clip_t5xxl = None

        def tokenize_with_weights(self, text):
            return {"t5xxl": [[(1, 1.0)]]}

    class Clip:
        tokenizer = Tokenizer()

    with pytest.raises(ValueError, match="needs CLIP text encoders.*t5xxl"):
        describe_prompt(Clip(), "a person")


def test_words_go_to_the_node_that_they_are_about(monkeypatch):
    sent = []
    instance = SimpleNamespace(send_sync=lambda *message: sent.append(message), client_id="me")
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    warn("<anna> & <bob>\nare here.", "7")
    show("nobody", None)
    show("as it should be", "8")
    assert sent == [
        ("nested_attention.notice", {"node_id": "7", "text": "<anna> & <bob>\nare here.", "warning": True}, "me"),
        ("nested_attention.notice", {"node_id": "8", "text": "as it should be", "warning": False}, "me"),
    ]


def test_a_clip_whose_model_another_node_replaced(base_model, base_clip, person):
    """As nodes do that choose a device for it: what encodes then is the model in the patcher."""
    moved = base_clip.clone()
    moved.patcher.model = copy.deepcopy(base_clip.cond_stage_model)
    clip = apply(base_model, moved, person)
    assert columns(encode(clip, "a <anna>")) == [(0, "<anna>", 2, 1.0)]
    assert clip.cond_stage_model is moved.patcher.model


@pytest.mark.parametrize("family, encoder", [("SDXLRefiner", "g"), ("SD20", "h")])
def test_a_clip_of_one_encoder(base_model, person, family, encoder):
    """The refiner's tokenizer is one for two."""
    small = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    options = {f"clip_{encoder}_model_config": {**small, "projection_dim": 64}}
    target = getattr(comfy.supported_models, family)({}).clip_target()
    clip = apply(base_model, comfy.sd.CLIP(target, embedding_directory=None, model_options=options), person)
    assert columns(encode(clip, "an <anna>")) == [(0, "<anna>", 2, 1.0)]
    assert describe_prompt(clip, "an <anna>").startswith(f"CLIP-{encoder.upper()} section 1: 1:an 2:<anna>(as person)")


def test_tokens_can_be_copied(clip):
    """As nodes do that edit prompts."""
    tokens = clip.tokenize("a (<person>:1.2) here")
    for copied in (copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))):
        assert columns(clip.encode_from_tokens_scheduled(copied)) == [(0, "<person>", 2, 1.2)]
    tokenizer = copy.deepcopy(clip.tokenizer)
    tokenizer.another_nodes_own = 1
    assert tokenizer.tokenize_with_weights("a <person>") == clip.tokenizer.tokenize_with_weights("a <person>")


def test_a_ledger_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(marks, "MOST", 3)
    ledger = marks.Ledger()
    for name in "abcabd":
        ledger.add([marks.Section(name, 77, ())])
    assert list(ledger.sections) == ["a", "b", "d"]
