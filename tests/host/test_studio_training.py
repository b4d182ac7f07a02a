"""A few steps of every stage of `studio/`, on noise in place of the rendered pictures."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from random import Random

import comfy.model_management
import numpy as np
import pytest
import torch

from nested_attention.files import read_adapter, read_tensors, write_atomically
from nested_attention.host.studio import load_studio
from studio import __main__ as command
from studio import (
    adapters,
    compare,
    evidence,
    export,
    inside,
    judge,
    looking,
    loop,
    pictures,
    report,
    rivals,
    scenes,
    train_base,
    train_text,
    train_vision,
    warm_start,
    words,
)

DECOUPLED = {"name": "decoupled", "objective": rivals.DecoupledObjective, "value_share": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Few identities, whose pictures are noise of the right shape: what is drawn does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        noise = np.random.default_rng(0).integers(0, 255, (64, pictures.SIDE, pictures.SIDE, 4), np.uint8)
        patch.setattr(pictures, "render", lambda jobs, path, side=128: noise[np.arange(len(jobs)) % len(noise)])
        patch.setattr(pictures, "IDENTITIES", {"people": 16, "animals": 16})
        patch.setattr(pictures, "HELD_OUT", 8)
        patch.setattr(pictures, "PHOTOGRAPHED", {"people": {"studio_person": 9}, "animals": {"studio_pet": 9}})
        patch.setattr(pictures, "PLACES", 2)
        patch.setattr(evidence, "CANDIDATES", 3)
        patch.setattr(evidence, "DRAWN_BEFORE", 0)
        patch.setattr(evidence, "STEPS", 2)
        patch.setattr(compare, "STRENGTHS", (1.0, 1.5))
        patch.setattr(compare, "SHOWN", 1)
        yield scenes.World(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def vocabulary(world):
    return words.Words(world, captions=50)


@pytest.fixture(scope="module")
def weights(world, work, vocabulary):
    """The base model after two steps, and the folder of its file, with the image encoder's."""
    text = train_text.train_text(world, vocabulary, work, 2)
    painter = train_base.train_base(world, vocabulary, text, work, 2)
    export.export(painter, train_vision.train_vision(world, work, 2), vocabulary, work / "weights", {})
    return painter, work / "weights"


@pytest.fixture(scope="module")
def base(weights):
    return load_studio(weights[1])


@pytest.fixture(scope="module")
def trained(world, work, base):
    """The file of an adapter after two steps; each is trained once."""
    return lambda kind, **changes: adapters.train_adapter(world, base, kind, work, 2, 2, batch=2, **changes)


def losses(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_host_encodes_text_as_the_training_did(weights, vocabulary):
    painter, folder = weights
    clip = load_studio(folder).clip
    text = "a happy person wearing a red hoodie"
    states = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]
    with torch.no_grad():
        expected = painter.text(*vocabulary.batch([vocabulary(text)]))
    torch.testing.assert_close(states, expected, rtol=0.02, atol=0.02)  # weights in half precision


def test_a_warm_start_comes_closer_to_what_a_caption_says(world, work, base):
    config = adapters.settings("people", work, work, 2)
    warm_start.warm_start(world, base, "people", config, work / "warm", 150)
    found = [line["loss"] for line in losses(work / "warm")]
    assert found[-1] < 0.5 * found[0]


def test_a_text_encoder_learns_to_tell_what_its_words_say(world, work, vocabulary):
    train_text.train_text(world, vocabulary, work / "telling", 40)
    found = [line["loss"] for line in losses(work / "telling" / "text")]
    assert found[-1] < 0.9 * found[0]


def test_an_unknown_word_is_one_known_vector(weights):
    clip = load_studio(weights[1]).clip
    zebra, tulip = (clip.encode_from_tokens_scheduled(clip.tokenize(t))[0][0] for t in ("a zebra", "a tulip"))
    assert torch.equal(zebra, tulip) and zebra.abs().sum() > 0


def test_pixels_survive_the_vae(weights):
    vae = load_studio(weights[1]).vae
    picture = torch.rand(1, 64, 64, 3)
    latents = vae.encode(picture)
    assert latents.shape == (1, 12, 32, 32)
    torch.testing.assert_close(vae.decode(latents), picture, rtol=0, atol=1e-5)


def test_a_training_goes_on_where_it_was(world, work, vocabulary, weights):
    """What is finished is read, not trained again."""
    before = losses(work / "base")
    text = train_text.train_text(world, vocabulary, work, 2)
    painter = train_base.train_base(world, vocabulary, text, work, 2)
    assert losses(work / "base") == before
    assert all(torch.equal(a, b) for a, b in zip(painter.parameters(), weights[0].parameters(), strict=True))


def test_a_stopped_training_is_the_uninterrupted_one(tmp_path, monkeypatch):
    """With dropout, whose chance is not in the batches."""
    monkeypatch.setattr(loop, "SAVE_AFTER", 0.0)

    def trained(folder, stop_at):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        steps = iter(range(stop_at))

        def write(path, content):
            write_atomically(path, content)
            next(steps)

        def losses_of(batch):
            return {"loss": (module(batch["x"]) - 1).square().mean()}

        def batch_of(number):
            return {"x": torch.randn(16, 4, generator=torch.Generator().manual_seed(number))}

        monkeypatch.setattr(loop, "write_atomically", write)  # after each step
        return loop.train(module, batch_of, losses_of, loop.Plan(6, 16, rate=0.1, warmup=1), folder)

    straight = trained(tmp_path / "straight", 6)
    with pytest.raises(StopIteration):
        trained(tmp_path / "parts", 2)
    parts = trained(tmp_path / "parts", 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), parts.parameters(), strict=True))
    assert [line["step"] for line in losses(tmp_path / "parts")] == [6]


def test_a_gpu_sees_each_batch_several_times(monkeypatch):
    """A fresh one for every fourth step, also where a training goes on; others are of those kept, the last few."""
    monkeypatch.setattr(loop, "KEPT", 3)

    def seen(steps):
        numbers = [loop.batch_number(step) for step in steps]
        return list(loop.repeated(iter(dict.fromkeys(numbers)), numbers))

    straight = seen(range(29))
    assert straight[:: loop.TIMES] == list(range(8)) == sorted(set(straight))
    assert all(step // loop.TIMES - 3 < batch <= step // loop.TIMES for step, batch in enumerate(straight))
    assert all(seen(range(start, 29)) == straight[start:] for start in range(29))


def test_numbers_of_one_part_or_of_all(monkeypatch, capsys):
    given = argparse.Namespace(steps=dict(map(command.counted, ("7", "base=9"))), batch={"base": 5})
    assert (command.steps(given, "base"), command.steps(given, "judge")) == (9, 7)
    assert command.size(given, "base") == {"steps": 9, "size": 5} and command.size(given, "judge") == {"steps": 7}
    monkeypatch.setattr(sys, "argv", ["studio", "--steps", "bass=9"])
    with pytest.raises(SystemExit):
        command.main()
    assert "unknown: bass; there are vision, text, base" in capsys.readouterr().err


def test_words_are_read_as_the_tokenizer_reads_them(world, vocabulary):
    for caption in [world.words(Random(i)) for i in range(50)]:
        assert vocabulary.tokens(caption) == vocabulary.tokenizer(caption)["input_ids"]


def test_nouns_stand_where_their_figures_do(world, vocabulary):
    rng = Random(0)
    for kinds in scenes.STANDS:
        for told in (0.0, 1.0):
            scene = world.scene(rng, kinds=kinds, told=told)
            tokens = vocabulary.tokenizer.convert_ids_to_tokens(vocabulary.tokens(scene.caption))
            columns = words.noun_columns(scene.caption, scene.figures, world, vocabulary)
            nouns = [{"person", "pet", world.attributes(f)[0].get("kind", "")} for f in scene.figures]
            assert all(tokens[c].removesuffix("</w>") in names for c, names in zip(columns, nouns, strict=True)), tokens
            assert sorted(set(columns)) == columns  # as the figures stand, from left to right
            centers = (
                looking.shapes(world, scene).sum(1) @ torch.arange(16.0) / looking.shapes(world, scene).sum((1, 2))
            )
            boxes = [(left + side / 2) / 8 - 0.5 for left, _, side in (f.box for f in scene.figures)]
            assert all(abs(c - b) < 2 for c, b in zip(centers.tolist(), boxes, strict=True)), (centers, boxes)


def test_what_is_looked_at_can_be_learned_and_changes_no_forward(world, vocabulary, weights):
    """The error against a softmax of the same numbers falls along its gradient; attention itself is the host's."""
    unet = copy.deepcopy(weights[0].unet).requires_grad_(True)
    torch.nn.init.normal_(unet.out[-1].weight, std=0.1)  # after two steps it lets hardly anything out
    scene = world.scene(Random(0), kinds=("people", "people"))
    states = weights[0].text(*vocabulary.batch([vocabulary(scene.caption)])).detach()
    noisy = torch.randn(1, 12, 32, 32, generator=torch.Generator().manual_seed(0))
    errors = []
    for _ in range(2):
        watched = looking.Looking(**looking.looked_at(world, vocabulary, [scene], [scene.caption]))
        out = unet(noisy, torch.tensor([500.0]), context=states, transformer_options=watched.options(unet))
        torch.testing.assert_close(out, unet(noisy, torch.tensor([500.0]), context=states), rtol=1e-3, atol=1e-4)
        assert len(watched.errors) == 7
        errors.append(watched.error.item())
        parameters = [p for name, p in unet.named_parameters() if "attn2.to_" in name]
        gradients = torch.autograd.grad(watched.error, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= 3.0 * gradient
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", ["people", "animals"])
def test_pairs_are_of_one_subject_in_two_views(world, tmp_path, kind):
    listing = adapters.make_pairs(world, kind, tmp_path, 6)
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert len(lines) == 6 and all(adapters.CLASSES[kind] in line["caption"].split() for line in lines)
    assert all((tmp_path / line[name]).exists() for line in lines for name in ("image", "crop"))


def test_evidence_from_a_few_steps(world, work, base, trained):
    """All methods train, draw and are scored; an interrupted run draws nothing twice."""
    own, other = trained("people"), trained("people", **DECOUPLED)
    assert not all(
        torch.equal(a, b) for a, b in zip(read_adapter(own).parameters(), read_adapter(other).parameters(), strict=True)
    )
    methods = {"none": evidence.nobody, "nested": evidence.nested(own), "decoupled": evidence.decoupled(other)}
    seer = judge.train_judge(world, work, 2)
    assert not seer.training  # its dropout would blur every score
    comparison = compare.Comparison(world, base, seer, work, work, 2)
    comparison.score("scores", methods, ("people",), (own, other), (1.0,))
    found = json.loads((work / "scores-seed-0.json").read_text())["scores"]
    assert found.keys() == {"ceiling", *methods}
    assert all(0 <= value <= 1 for values in found["nested"]["1.0"].values() for value in values)
    assert all(len(values) == 2 for values in found["nested"]["1.0"].values())
    comparison.score("scores", {"nested": lambda *_: pytest.fail("drawn twice")}, ("people",), (own, other), (1.0,))
    drawn = []
    again = {"none": lambda *given: drawn.append(given) or evidence.nobody(*given)}
    replace(comparison, count=1).score("scores", again, ("people",), (own, other), (1.0,))
    found = json.loads((work / "scores-seed-0.json").read_text())["scores"]
    assert len(drawn) == 1 and found.keys() == {"none", "ceiling"}  # of other cases all is done anew
    replace(comparison, count=1).score("scores", again, ("people",), (other,), (1.0,))
    assert len(drawn) == 2  # and with other adapters
    [used] = json.loads((work / "scores-seed-0.json").read_text())["made"]["adapters"].values()
    assert used["settings"]["value_share"] == 0.0 and used["weights"] != compare.record(own)["weights"]


def test_methods_change_the_picture_and_no_strength_does_not(world, base, trained):
    [case] = evidence.cases(world, 1)
    plain = evidence.draw(base, evidence.nobody, case)
    for made in (evidence.nested(trained("people")), evidence.decoupled(trained("people", **DECOUPLED))):
        assert not torch.equal(evidence.draw(base, made, case, 1.0), plain)
        torch.testing.assert_close(evidence.draw(base, made, case, 0.0), plain, rtol=0, atol=1e-4)


def test_two_subjects_are_drawn_and_scored(world, base, trained):
    files = [trained(kind) for kind in adapters.CLASSES]
    [case] = evidence.cases(world, 1, kinds=("people", "animals"), photos=2)
    assert "<person>" in case.prompt and "<pet>" in case.prompt
    method = evidence.nested(*files, choices={"animals": {"competition": 2.0}})
    row = evidence.score(world, judge.Judge(), [case], evidence.draw(base, method, case)[None])
    [person], [pet] = (row[f"identity of {kind}"] for kind in ("people", "animals"))
    assert row["identity"] == pytest.approx([(person + pet) / 2])


def test_the_whole_command(world, tmp_path, monkeypatch):
    """`python -m studio`: all stages with one step of each training, and the page that comes out in the end."""
    results, docs, weights = tmp_path / "studio" / "results", tmp_path / "docs", tmp_path / "weights"
    for folder in (results, docs, tmp_path / "assets"):
        folder.mkdir(parents=True)
    (results / "findings.md").write_text("What comes out.")
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n{report.BEGIN} stale {report.END}\nAfter.")
    options = {"steps": 1, "batch": 8, "cases": 4, "work": tmp_path / "work", "weights": weights}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["studio", *arguments])
    monkeypatch.setattr(command, "HERE", tmp_path / "studio")
    monkeypatch.setattr(command, "find_host", lambda: None)  # it is found already
    monkeypatch.setattr(warm_start, "BATCH", 8)
    # A model that an earlier test still holds would make the host collect garbage at each of a thousand loads.
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [])
    command.main()

    assert {path.name for path in (tmp_path / "assets").iterdir()} == {"studio_person.png", "studio_pet.png"}
    assert {path.name for path in (weights / "adapters").iterdir()} == {
        "studio_person.safetensors",
        "studio_pet.safetensors",
    }
    tops = json.loads((results / "concentration.json").read_text())
    assert all(0 < a <= b <= 1 for a, b in zip(tops["top 1"], tops["top 2"], strict=True))
    assert all(
        a <= b + 1e-6 for name in ("top 1", "noun") for a, b in zip(tops[name], tops["top 1 distinct"], strict=True)
    )
    for file, key in (("studio", "training"), ("adapters/studio_pet", "made")):
        _, notes = read_tensors(weights / f"{file}.safetensors")
        assert json.loads(notes[key])["command"] == "python -m studio --steps 1 --batch 8"
    page, short = (docs / "evidence.md").read_text(), readme.read_text()
    assert all(
        row in page
        for row in (
            "| decoupled cross-attention | 1.5 |",
            "| both |",
            "| 8 tokens | 1.0 | as it ships |",
            "| three photos | 1.0 |",
        )
    )
    pairs = len(evidence.pairs_of(evidence.cases(world, 4)))
    assert "What comes out." in page and "trained for 1 steps" in page and f"out of one of {pairs} pictures" in page
    assert short.startswith("Before.") and short.endswith("After.") and "stale" not in short
    assert short.count("| **nested attention** |") == 2 and short.count("%") == 3 * 10
    for picture in ("evidence", "people", "pairs", "two_people", "drawing", "inside"):
        assert f"({picture}.png)" in page and (docs / f"{picture}.png").exists()

    monkeypatch.setattr(sys, "argv", ["studio", "report"])
    (docs / "evidence.md").unlink()
    command.main()
    assert (docs / "evidence.md").read_text() == page and readme.read_text() == short


def test_tokens_that_are_alike_are_taken_together():
    token, other = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    together = inside.alike(torch.stack((token, other, token * 1.01, other, -token)))
    assert together.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_scenes_are_the_same_for_the_same_chance(world):
    first, second = (world.scene(Random(3)) for _ in range(2))
    assert np.array_equal(first.picture, second.picture) and first.caption == second.caption


def test_the_mean_of_two_trainings_is_no_share():
    """Nobody is found by half, so Wilson's interval is for one training alone."""
    found = {1: [1.0] * 9 + [0.0], 2: [1.0] * 9 + [0.5]}
    told = {seeds: report.cells({"retrieved": scores}, {"retrieved": ""}) for seeds, scores in found.items()}
    assert told[1] == ["90.0% (59.6% to 98.2%)"]
    assert told[2] == ["95.0% ({:.1%} to {:.1%})".format(*evidence.interval(found[2])[1:])]
