"""The evidence as a page: tables and plots from the scores that were kept, without drawing anything again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .evidence import ASKED, ATTRIBUTES, WITHOUT_STRENGTH, Scores, interval

NAMES = {
    "none": "no personalization",
    "told": "told in words",
    "nested": "nested attention",
    "decoupled": "decoupled cross-attention",
    "single": "single token",
    "ceiling": "real pictures",
}
IN_SHORT = {
    "none": "{}, no subject",
    "nested": "**nested attention**",
    "single": "single token",
    "decoupled": "decoupled cross-attention (IP-Adapter's way)",
    "told": "told in words, no photo",
    "ceiling": "the judge on real pictures",
}
BEGIN, END = "<!-- scores, by python -m studio evidence -->", "<!-- end of scores -->"
COLORS = {"nested": "#d6336c", "decoupled": "#1c7ed6", "single": "#f08c00"}
SCORES = {"identity": "identity", "retrieved": "found among 50", "prompt": "prompt"}
EACH = {"identity of people": "identity, person", "identity of animals": "identity, pet", "prompt": "prompt"}
ORDER = ["none", "told", "nested", "decoupled", "single"]  # of rows; then others in their own order, "ceiling" last

Pooled = dict[str, dict[str, Scores]]
"""By method and strength, the scores of each case."""


def report(results: Path, docs: Path) -> Path:
    """docs/evidence.md, its plot and the README's table, from the score files in `results`, of one or more seeds each.

    What a person makes of the numbers is in `results/findings.md`, which becomes the page's beginning.
    """
    names = ("people", "pairs", "two-people", "pets", "training", "drawing")
    files = {name: [read(path) for path in sorted(results.glob(f"{name}-seed-*.json"))] for name in names}
    seeds = {name: [run["scores"] for run in runs] for name, runs in files.items()}
    made = {name: runs[0]["made"] for name, runs in files.items()}
    found = {name: pool(runs) for name, runs in seeds.items()}
    plot(found["people"], docs / "evidence.png")
    tables = {name: table(found[name], EACH if name == "pairs" else SCORES) for name in names}
    plain = ["none", "told", "ceiling"]
    pairs = [(["as it is"], plain), (["competition 2", "regions", "both"], ["as it is"])]
    differences = {
        "people": apart(found["people"], [(["nested"], ["decoupled", "single", *plain])]),
        "pets": apart(found["pets"], [(["nested"], plain)]),
        "pairs": apart(found["pairs"], pairs, EACH),
        "two_people": apart(found["two-people"], pairs),
        "training": apart(found["training"], [(found["training"], ["as it ships"])]),
        "drawing": apart(found["drawing"], [(found["drawing"], ["as it is"])]),
    }
    findings, tops = results / "findings.md", json.loads((results / "concentration.json").read_text())
    page = PAGE.format(
        **{name.replace("-", "_"): text for name, text in tables.items()},
        **{f"{name}_apart": text for name, text in differences.items()},
        seeds=lines(by_seed(seeds["people"]), ["method", "seed", *SCORES.values()]),
        one_by_one=one_by_one(found["people"], "people"),
        one_by_one_pets=one_by_one(found["pets"], "animals"),
        findings=findings.read_text(encoding="utf-8").strip() if findings.exists() else "",
        cases=count(found["people"]),
        pairs_of_people=count(found["two-people"]),
        judge=made["people"]["lengths"]["judge"],
        start=made["people"]["lengths"]["warm start"],
        full=made["people"]["adapters"]["person"],
        part=made["training"]["adapters"]["as-it-ships"],
        concentration=concentration(tops),
        people_inside=len(tops["distinct"]),
        fewest=min(tops["distinct"]),
        most=max(tops["distinct"]),
    )
    (docs / "evidence.md").write_text(page, encoding="utf-8")
    readme = docs.parent / "README.md"
    short = f"{BEGIN}\n\n{in_short(found)}\n\n{END}"
    readme.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: short, readme.read_text("utf-8"), flags=re.S), "utf-8")
    return docs / "evidence.md"


def read(path: Path) -> dict[str, Any]:
    """What the scores were made of, and the scores."""
    return json.loads(path.read_text())


def pool(seeds: list[Pooled]) -> Pooled:
    """Of each case, the mean over the seeds of the training that it was drawn with."""
    pooled: Pooled = {}
    for method in dict.fromkeys(method for found in seeds for method in found):
        of = [found[method] for found in seeds if method in found]
        pooled[method] = {
            strength: {key: np.mean([scores[strength][key] for scores in of], axis=0).tolist() for key in first}
            for strength, first in of[0].items()
        }
    return pooled


def count(pooled: Pooled) -> int:
    return len(pooled["none"]["1.0"]["prompt"])


def ordered(pooled: Pooled) -> list[str]:
    return sorted(pooled, key=lambda name: ORDER.index(name) if name in ORDER else 9 + (name == "ceiling"))


def lines(rows: list[list[str]], columns: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def cells(scores: Scores, columns: Mapping[str, str]) -> list[str]:
    """Whether somebody was found is yes or no, but for means of two trainings or two people."""
    shares = {k: k == "retrieved" and {*scores[k]} <= {0, 1} for k in columns}
    return ["{:.1%} ({:.1%} to {:.1%})".format(*interval(scores[k], share)) for k, share in shares.items()]


def table(pooled: Pooled, columns: Mapping[str, str]) -> str:
    rows = [
        [NAMES.get(method, method), "" if method in WITHOUT_STRENGTH else strength, *cells(scores, columns)]
        for method in ordered(pooled)
        for strength, scores in pooled[method].items()
    ]
    return lines(rows, ["method", "strength", *columns.values()])


def apart(
    pooled: Pooled,
    pairs: Iterable[tuple[Iterable[str], Iterable[str]]],
    columns: Mapping[str, str] = SCORES,
) -> str:
    """What the first ones of each pair score more than the others at the same strength, case by case."""
    rows = [
        [
            NAMES.get(a, a),
            strength,
            NAMES.get(b, b),
            *(signed(scores[key], pooled[b][strength][key]) for key in columns),
        ]
        for first, others in pairs
        for a in first
        for b in others
        if a in pooled and a != b
        for strength, scores in pooled[a].items()
        if strength in pooled[b]
    ]
    return lines(rows, ["method", "strength", "above", *columns.values()])


def signed(first: Sequence[float], second: Sequence[float]) -> str:
    """The mean difference, its interval, and how many cases are higher and lower."""
    each = np.subtract(first, second)
    return "{:+.1%} ({:+.1%} to {:+.1%}) {}/{}".format(*interval(each), (each > 1e-9).sum(), (each < -1e-9).sum())


def by_seed(seeds: list[Pooled]) -> list[list[str]]:
    """At strength 1, by each training apart."""
    return [
        [NAMES[method], str(seed), *cells(found[method]["1.0"], SCORES)]
        for method in ("nested", "decoupled", "single")
        for seed, found in enumerate(seeds)
        if method in found
    ]


def one_by_one(pooled: Pooled, kind: str) -> str:
    """Attributes at strength 1: those of the identity, then what the prompt asks for."""
    keys = [*(f"{kind} {key}" for key in (*ATTRIBUTES[kind].IDENTITY, *ASKED[kind])), "scene place"]
    rows = [
        [NAMES[method], *(f"{np.mean(pooled[method]['1.0'][key]):.0%}" for key in keys)] for method in ordered(pooled)
    ]
    return lines(rows, ["method", *(key.split(" ", 1)[1] for key in keys)])


def in_short(found: dict[str, Pooled]) -> str:
    """Means at strength 1, for the README."""
    rows = [
        [IN_SHORT[method].format(who), *(f"{np.mean(found[name][method]['1.0'][key]):.1%}" for key in SCORES)]
        for name, who in (("people", "person"), ("pets", "pet"))
        for method in IN_SHORT
        if method in found[name]
    ]
    return lines(rows, ["at strength 1", "identity", "right one of 50 found", "prompt"])


def concentration(tops: dict[str, list[float]]) -> str:
    names = {
        "top 1": "the first token has at most",
        "top 2": "the first two have at most",
        "top 1 distinct": "alike taken together: the first",
        "top 2 distinct": "alike taken together: the first two",
        "noun": "those of the plain noun",
    }
    rows = [[name, *(f"{x:.2f}" for x in tops[key])] for key, name in names.items()]
    return lines(rows, ["of all queries", *(f"{q:.0%}" for q in tops["quantile"])])


def plot(pooled: Pooled, path: Path) -> None:
    """Identity against prompt, one curve of strengths per method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), dpi=130)
    for method, color in COLORS.items():
        if method not in pooled:
            continue
        points = [(float(s), scores) for s, scores in pooled[method].items()]
        x, y = ([np.mean(scores[key]) for _, scores in points] for key in ("prompt", "identity"))
        axes.plot(x, y, "o-", color=color, label=NAMES[method])
        for (strength, _), a, b in zip(points, x, y, strict=True):
            axes.annotate(f"{strength:g}", (a, b), textcoords="offset points", xytext=(5, 4), fontsize=8, color=color)
    for name, mark in (("none", "kx"), ("told", "k*"), ("ceiling", "k+")):
        plain = pooled[name]["1.0"]
        axes.plot(np.mean(plain["prompt"]), np.mean(plain["identity"]), mark, label=NAMES[name])
    axes.set(xlabel="what the prompt asked for that is there", ylabel="identity attributes that are right")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)


PAGE = """# Evidence

Is it the same one, and does the picture do what the prompt says? Measured with the small model that comes with the
pack, on people and pets who were in no training. `python -m studio judge rivals ablations evidence report` makes this
page; the scores behind it, and the settings they are of, lie in `studio/results/`, from which `python -m studio report`
makes it again.

{findings}

## How it is measured

- **Identity**: of hair or headgear, its color, skin, glasses and beard (of a pet: kind, fur, markings, their color and,
  where they are open, eyes), the part that a judge reads off the picture rightly. **Found among 50**: how often the
  right one of 50 fits best to what the judge sees; the others are those of the 199 held out who are most alike; a tie
  counts as found. **Prompt**: of expression, clothes, their color and the background (of a pet: mood, what it wears and
  the background), the part that is as asked.
- **Who**: {cases} people and pets who were in no training, and by whom nothing about this model was chosen. They are
  new combinations of known attributes, picked by chance among all.
- The judge is a network of its own, trained for {judge[steps]} steps of {judge[batch]} on rendered pictures of those
  who are trained on. What it scores on **real pictures**, the very same ones doing just what the prompts ask, drawn by
  what drew the training's pictures, is the ceiling; with somebody who is read more easily, or by chance, a model may
  score a bit more. **Told in words** is the base model alone, with a prompt that names all that is scored: the most
  that words can do.
- All ways were trained for {full[steps]} steps of {full[settings][batch]} on the same pairs with the same settings,
  which were chosen for nested attention, after {start} steps of a warm start in which the Q-Former learns to give for a
  photo the text states of a caption that tells all; the same one for each number of tokens. The word's values are
  larger, and learn faster, in heads that give it less than 15 % of their attention (`value_share`), with nested
  attention and the single token; decoupled attention passes through no word.
- In brackets the 95 % interval of the mean (bootstrap over the cases; Wilson's where each was found or not). It is of
  chance among cases; of chance in training the two seeds give an idea, which share base and warm start. Differences are
  taken case by case: the same person, prompt and noise; after them, in how many cases the score is higher/lower. With
  fewer than six on one side and none on the other, chance alone does it more often than one time in twenty (sign test),
  whatever the interval says.

## One person, against other ways

*Nested attention* is this pack's node: 32 tokens, the image encoder's last layer, `norm` off, `value_share` 0.15.
*Decoupled cross-attention* is IP-Adapter's way: attention over the same Q-Former's tokens is added to the text's
everywhere. *Single token* is one value for the word in each layer, the same at every place. Each was trained twice,
from two seeds, after one warm start for each number of tokens; a case's score is the mean of the two.

{people}

![Identity against prompt over the strength](evidence.png)

By how much nested attention is above the others:

{people_apart}

One by one, at strength 1, first who it is, then what the prompt asks for:

{one_by_one}

By the seed of the training, at strength 1; the adapter of seed 0 ships:

{seeds}

The first six people:

![Six people, drawn in all ways](people.png)

## One pet

{pets}

{pets_apart}

{one_by_one_pets}

## A person and a pet in one picture

Each scored apart, with one photo of each; with and without
competition between the subjects for each place, and a region for each (left, right).

{pairs}

{pairs_apart}

![Six pairs, drawn in all ways](pairs.png)

## Two people in one picture

The same class twice: one adapter, one photo of each, and one prompt with a word of its own for each, as in
`workflows/two_people.json`; with and without competition, and a region for each (left, right). Each of the two is
scored apart, cut out of one of {pairs_of_people} pictures and enlarged to the size that the judge knows; a picture's
score is the mean of the two.

{two_people}

{two_people_apart}

![Six pairs of people, drawn in all ways](two_people.png)

## Choices of training

Each trained for {part[steps]} steps after the warm start, if not said otherwise, and drawn at strength 1.

{training}

{training_apart}

## Choices of drawing

The person adapter that ships, at strength 1. *All places alike* sets the adapter's keys to zero: then every place sees
the mean of all nested values, and nothing is looked up.

{drawing}

{drawing_apart}

![Six people, drawn with all choices](drawing.png)

How much of the nested attention the largest of its 32 tokens have, over all places of all layers at the last step, mean
over heads, for {people_inside} people. The warm start fills up what no attribute needs with the plain noun, so that the
32 of a person are {fewest} to {most} distinct ones (alike is what differs by less than a twentieth of its length):

{concentration}

## Inside

One held-out person: where the word is attended, what it looks up at every place against the one value that it would be
without nesting, which tokens three points look at, and what those looked at in the photo. The two largest tokens of a
point may be two of the plain noun's, which say nothing of this person.

![Attention, values, tokens at points, and what they looked at](inside.png)
"""
