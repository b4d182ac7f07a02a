"""What the nodes promise to saved workflows, and their texts in two languages."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.locales import main_texts, node_texts, read

ROOT = Path(__file__).parents[2]

# Required inputs are saved before all optional ones ("?"), so a new one has to be optional. What a workflow has saved
# has to stay within a number's limits, and where it has nothing, the default counts.
PROMISES = {
    "NestedAttentionLoadStudio": ("", "MODEL CLIP VAE CLIP_VISION"),
    "NestedAttentionLoadAdapter": ("adapter_name feature_layer norm", "NESTED_ADAPTER"),
    "NestedAttentionEncodeSubject": ("adapter clip_vision image fit images mask?", "NESTED_SUBJECT IMAGE"),
    "NestedAttentionApplySubject": (
        "model clip subject placeholder='<person>' class_word='' strength=1(0..3) token_weight=1(1..10) "
        "start_percent=0(0..1) end_percent=1(0..1) region? low_memory?=False competition?=0(0..10)",
        "MODEL CLIP",
    ),
    "NestedAttentionAlignFace": ("image order index=0(0..15) without_face points='' face_landmarks?", "IMAGE"),
    "NestedAttentionCropSubject": (
        "image margin=0.1(0..1) square=True background x=0(0..16384) y=0(0..16384) width=0(0..16384) "
        "height=0(0..16384) mask?",
        "IMAGE",
    ),
    "NestedAttentionCombineSubjects": ("subject_a subject_b mode weight=0.5(0..1)", "NESTED_SUBJECT"),
    "NestedAttentionRecord": (
        "model steps='all' layers='' picture=0(0..4095) limit_mb=512(1..65536)",
        "MODEL NESTED_RECORD",
    ),
    "NestedAttentionInspect": (
        "record subject generated view points='0.4,0.4; 0.6,0.4; 0.5,0.6' layers='' photo? clip_vision?",
        "IMAGE",
    ),
    "NestedAttentionPromptInfo": ("clip text", "STRING"),
    "NestedAttentionSaveSubject": ("subject filename_prefix='subject'", ""),
    "NestedAttentionLoadSubject": ("subject_name adapter?", "NESTED_SUBJECT"),
    "NestedAttentionTrain": (
        "model clip vae clip_vision name='person' class_word='person' captions='' dataset='' steps=2000(1..1e+07) "
        "learning_rate=0.0001(0..1) tokens=1024(1..4096) batch=1(1..1024) seed=0(0..9.22337e+18) "
        "resolution=1024(16..4096) images? crops? adapter? preview_every?=250(0..1e+06) preview_prompt?='' "
        "accumulation?=1(1..1024) warmup?=100(0..1e+06) augment?=1(0..3) min_snr_gamma?=0(0..20) dim?=1280(64..8192) "
        "depth?=4(1..32) norm? feature_layer? gradient_checkpointing?=True cache? holdout?=0(0..100000) on_error? "
        "checkpoint_every?=500(1..1e+06)",
        "NESTED_ADAPTER IMAGE IMAGE",
    ),
    "NestedAttentionSaveAdapter": ("adapter filename_prefix='adapter'", ""),
}


def promised(widget):
    """A number as id=default(least..most), whatever else has a default as id=default."""
    text, default = widget.id + "?" * widget.optional, getattr(widget, "default", None)
    if getattr(widget, "max", None) is not None:
        return f"{text}={default:g}({widget.min:g}..{widget.max:g})"
    return text if default is None else f"{text}={default!r}"


def test_ids_inputs_and_outputs(pack):
    assert pack.keys() == PROMISES.keys()
    for name, (inputs, outputs) in PROMISES.items():
        schema = pack[name].define_schema()
        assert " ".join(promised(i) for i in schema.inputs) == inputs
        assert " ".join(o.io_type for o in schema.outputs) == outputs


def test_every_input_is_explained(pack):
    for node in pack.values():
        schema = node.define_schema()
        assert schema.description and schema.display_name and schema.category
        for each in schema.inputs:
            assert each.tooltip and len(each.tooltip) > 20, (schema.node_id, each.id)


def test_every_node_has_its_help_in_both_languages_and_none_is_left_over(pack):
    """The front end asks for <id>/<language>.md, then for <id>.md, which is English and for all other languages."""
    docs, chinese = ROOT / "web" / "docs", read("zh", "nodeDefs.json")
    files = {f"{name}{end}" for name in pack for end in (".md", "/zh.md")}
    assert {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} == files
    for name, node in pack.items():
        for path, title in (
            (docs / f"{name}.md", node.define_schema().display_name),
            (docs / name / "zh.md", chinese[name]["display_name"]),
        ):
            assert path.read_text(encoding="utf-8").startswith(f"# {title}\n")


def test_english_texts_are_the_schemas(pack):
    """After a change of names or tooltips: python scripts/locales.py"""
    schemas = [node.define_schema() for node in pack.values()]
    assert read("en", "main.json") == main_texts(schemas)
    assert read("en", "nodeDefs.json") == node_texts(schemas)


def leaves(texts, path=()):
    """Path and text of each entry of a locale file."""
    for key, value in texts.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


@pytest.mark.parametrize("name", ["main.json", "nodeDefs.json"])
def test_chinese_has_every_text(name):
    english, chinese = (dict(leaves(read(language, name))) for language in ("en", "zh"))
    assert chinese.keys() == english.keys()
    for path, text in chinese.items():
        assert text.strip() and text != english[path], path
        if path[-1] != "tooltip":  # the front end reads these as messages, in which such characters have a meaning
            assert not set("{}@|") & set(text + english[path]), path
