"""The evidence as a page: tables and plots from the scores that were kept, without drawing anything again."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .evidence import WITHOUT_STRENGTH, summary

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


Pooled = dict[str, dict[str, list[dict[str, float]]]]


def report(results: Path, docs: Path, steps: dict[str, int], part: float) -> Path:
    """docs/evidence.md, its plot and the README's table, from the score files in `results`, of one or more seeds each.

    What a person makes of the numbers is in `results/findings.md`, which becomes the page's beginning.
    """
    names = ("people", "pairs", "two-people", "pets", "training", "drawing", "photos")
    found = {name: pool(sorted(results.glob(f"{name}-seed-*.json"))) for name in names}
    plot(found["people"], docs / "evidence.png")
    tables = {name: table(found[name], EACH if name == "pairs" else SCORES) for name in names}
    findings, tops = results / "findings.md", json.loads((results / "concentration.json").read_text())
    page = PAGE.format(
        **{name.replace("-", "_"): text for name, text in tables.items()},
        apart=table(apart(found["people"]), SCORES),
        findings=findings.read_text(encoding="utf-8").strip() if findings.exists() else "",
        rows=len(found["people"]["none"]["1.0"]),
        cases=len(found["pets"]["none"]["1.0"]),
        pairs_of_people=len(found["two-people"]["none"]["1.0"]) // 2,
        part=round(part * steps["adapter"]),
        concentration=concentration(tops),
        **steps,
    )
    (docs / "evidence.md").write_text(page, encoding="utf-8")
    readme = docs.parent / "README.md"
    short = f"{BEGIN}\n\n{in_short(found)}\n\n{END}"
    readme.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: short, readme.read_text("utf-8"), flags=re.S), "utf-8")
    return docs / "evidence.md"


def pool(scores: list[Path]) -> Pooled:
    """Rows by method and strength, of all files."""
    pooled: Pooled = {}
    for path in scores:
        for method, by_strength in json.loads(path.read_text()).items():
            for strength, rows in by_strength.items():
                pooled.setdefault(method, {}).setdefault(strength, []).extend(rows)
    return pooled


def apart(pooled: Pooled) -> Pooled:
    """What nested attention scores more than the other ways, case by case."""
    found: Pooled = {other: {} for other in ("decoupled", "single")}
    for other, by_strength in found.items():
        for strength, rows in pooled["nested"].items():
            both = zip(rows, pooled[other][strength], strict=True)
            by_strength[strength] = [{key: ours[key] - theirs[key] for key in SCORES} for ours, theirs in both]
    return found


def table(pooled: Pooled, columns: dict[str, str]) -> str:
    lines = [f"| method | strength | {' | '.join(columns.values())} |", "| --- " * (len(columns) + 2) + "|"]
    # Those that NAMES does not hold stand at the top, after "none", in their own order.
    for method in sorted(pooled, key=lambda name: [*NAMES].index(name) if name in NAMES else 0):
        for strength, rows in pooled[method].items():
            numbers = summary(rows)
            cells = ["{:.1%} ({:.1%} to {:.1%})".format(*numbers[key]) for key in columns]
            shown = "" if method in ("ceiling", *WITHOUT_STRENGTH) else strength
            lines.append(f"| {NAMES.get(method, method)} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_short(found: dict[str, Pooled]) -> str:
    """Means at strength 1, for the README."""
    lines = ["| at strength 1 | identity | right one of 50 found | prompt |", "|---|---|---|---|"]
    for name, who in (("people", "person"), ("pets", "pet")):
        for method in (method for method in IN_SHORT if method in found[name]):
            means = {key: value for key, (value, *_) in summary(found[name][method]["1.0"]).items()}
            lines.append(f"| {IN_SHORT[method].format(who)} | {' | '.join(f'{means[key]:.1%}' for key in SCORES)} |")
    return "\n".join(lines)


def concentration(tops: dict[str, list[float]]) -> str:
    lines = [f"| of all queries | {' | '.join(f'{q:.0%}' for q in tops['quantile'])} |"]
    lines.append("| --- " * (len(tops["quantile"]) + 1) + "|")
    for key, name in (("top 1", "the first token has at most"), ("top 2", "the first two have at most")):
        lines.append(f"| {name} | {' | '.join(f'{x:.2f}' for x in tops[key])} |")
    return "\n".join(lines)


def plot(pooled: Pooled, path: Path) -> None:
    """Identity against prompt, one curve of strengths per method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), dpi=130)
    for method, color in COLORS.items():
        if method not in pooled:
            continue
        points = [(float(s), summary(rows)) for s, rows in pooled[method].items()]
        x, y = ([numbers[key][0] for _, numbers in points] for key in ("prompt", "identity"))
        axes.plot(x, y, "o-", color=color, label=NAMES[method])
        for (strength, _), a, b in zip(points, x, y, strict=True):
            axes.annotate(f"{strength:g}", (a, b), textcoords="offset points", xytext=(5, 4), fontsize=8, color=color)
    for name, mark in (("none", "kx"), ("told", "k*")):
        plain = summary(pooled[name]["1.0"])
        axes.plot(plain["prompt"][0], plain["identity"][0], mark, label=NAMES[name])
    axes.axhline(
        summary(pooled["ceiling"]["1.0"])["identity"][0], color="#868e96", ls=":", label="judge on real pictures"
    )
    axes.set(xlabel="what the prompt asked for that is there", ylabel="identity attributes that are right")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)


PAGE = """# Evidence

Is it the same one, and does the picture do what the prompt says? Measured with the small model that comes with the
pack, on people and pets who were in no training. `python -m studio judge rivals ablations evidence` makes this page;
the scores behind it lie in `studio/results/`.

{findings}

## How it is measured

- **Identity**: of hair or headgear, its color, skin, glasses and beard (of a pet: kind, fur, markings, their color
  and eyes), the part that a judge reads off the picture rightly. **Found among 50**: how often the right one of 50
  fits best to what the judge sees. **Prompt**: of expression, clothes, their color and the background, the part that
  is as asked.
- The judge is a network of its own, trained for {judge} steps on rendered pictures of those who are trained on. What
  it scores on rendered pictures of those held out ("real pictures") is the ceiling. "Told in words" is the base model
  alone, with a prompt that names all that is scored: the most that words can do.
- All ways were trained for {adapter} steps of 16 on the same pairs, after {start} steps of a warm start in which the
  Q-Former learns to give for a photo the text states of a caption that tells all; the same one for each number of
  tokens. The word's values are larger, and learn faster, in heads that give it less than 15 % of their attention
  (`value_share`), with nested attention and the single token; decoupled attention passes through no word.
- In brackets the 95 % interval of the mean (bootstrap over pictures).

## One person, against other ways

*Nested attention* is this pack's node as it ships. *Decoupled cross-attention* is IP-Adapter's way: attention over
the same Q-Former's tokens is added to the text's everywhere. *Single token* is one value for the word in each layer,
the same at every place. {rows} pictures for each row, half of each of two seeds (of the training and of the
pictures).

{people}

By how much nested attention is above them, picture by picture:

{apart}

![Identity against prompt over the strength](evidence.png)

The first six people:

![Six people, drawn in all ways](people.png)

## One pet

{cases} pictures for each row, like all that follows.

{pets}

## A person and a pet in one picture

Each scored apart, with one photo of each; with and without
competition between the subjects for each place, and a region for each (left, right).

{pairs}

![Six pairs, drawn in all ways](pairs.png)

## Two people in one picture

The same class twice: one adapter, one photo of each, and one prompt with a word of its own for each, as in
`workflows/two_people.json`; with and without competition, and a region for each (left, right). Each of the two is
scored apart, cut out of one of {pairs_of_people} pictures and enlarged to the size that the judge knows.

{two_people}

![Six pairs of people, drawn in all ways](two_people.png)

## Choices of training

Each trained for {part} steps, drawn at strength 1.

{training}

## Choices of drawing

The person adapter as it ships.

{drawing}

{photos}

![Six people, drawn with all choices](drawing.png)

How much of the nested attention the largest of its 32 tokens have, over all places of all layers at the last step:

{concentration}

## Inside

One held-out person: where the word is attended, what it looks up at every place against the one value that it would
be without nesting, which tokens three points look at, and what those looked at in the photo.

![Attention, values, tokens at points, and what they looked at](inside.png)
"""
