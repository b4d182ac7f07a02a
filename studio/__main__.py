"""Makes a small model to ship with the pack: `python -m studio [STAGE ...]`, each of which goes on where it was.

Stages, in order: pictures, vision, text, base, export, adapters, which make what ships, and judge, rivals, ablations,
evidence, which measure it, and report, which makes the page of what was measured, without training or drawing.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from nested_attention.training.__main__ import find_host
from nested_attention.training.processes import joined

HERE = Path(__file__).parent
STEPS = {
    "vision": 3500, "text": 2000, "base": 6000, "start": 3000, "adapter": 300, "judge": 8000,
}  # fmt: skip
SEEDS = (0, 1)
PART = 1 / 3  # of the steps, for the ablations
CHANGES = {
    "as it ships": {},
    "values start as the text's": {"value_share": 0.0},
    "clamp at 2": {"norm": "clamp", "norm_factor": 2.0, "value_share": 0.0},
    "rescale to 2": {"norm": "rescale", "norm_factor": 2.0, "value_share": 0.0},
    "rescale to 8": {"norm": "rescale", "norm_factor": 8.0, "value_share": 0.0},
    "8 tokens": {"queries": 8},
    "penultimate features": {"feature_layer": "penultimate"},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studio", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="all by default")
    parser.add_argument("--work", type=Path, default=HERE / "build", help="folder of what is made on the way")
    parser.add_argument("--weights", type=Path, default=HERE.parent / "weights", help="folder of what ships")
    parser.add_argument(
        "--steps", type=counted, action="append", default=[], metavar="[PART=]N",
        help=f"of a training ({', '.join(STEPS)}), or of all, in place of its own number",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=counted, action="append", default=[], metavar="[PART=]N",
        help="samples of a step of vision, text, base or judge, or of all of them, likewise",
    )  # fmt: skip
    parser.add_argument("--cases", type=int, default=100, help="subjects of each table of the evidence, 112 at most")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; all by default")
    given = parser.parse_args()
    given.steps, given.batch = dict(given.steps), dict(given.batch)
    if unknown := {*given.steps, *given.batch} - {"", *STEPS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if unknown := set(given.stages) - set(STAGES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    find_host()
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()  # trainings here know CPUs and CUDA alone
    if given.threads:
        torch.set_num_threads(given.threads)
    with joined("gloo"):
        for stage in given.stages or STAGES:
            print(f"== {stage}", flush=True)
            STAGES[stage](given)


def world(given: argparse.Namespace):
    from .scenes import World

    return World(given.work)


def counted(text: str) -> tuple[str, int]:
    """'base=9000', or '9000' of all parts, whose name is empty."""
    part, _, number = text.rpartition("=")
    return part, int(number)


def steps(given: argparse.Namespace, part: str) -> int:
    return given.steps.get(part, given.steps.get("", STEPS[part]))


def size(given: argparse.Namespace, part: str) -> dict[str, int]:
    batch = given.batch.get(part, given.batch.get(""))
    return {"steps": steps(given, part)} | ({"size": batch} if batch else {})


def made_by(given: argparse.Namespace) -> str:
    """The command that makes the same from nothing."""
    lengths = [(name, *each) for name in ("steps", "batch") for each in getattr(given, name).items()]
    return " ".join(["python -m studio", *(f"--{name} {part}{'=' if part else ''}{n}" for name, part, n in lengths)])


def pictures(given: argparse.Namespace) -> None:
    from .pictures import photos

    world(given)
    photos(given.work, HERE.parent / "assets")


def vision(given: argparse.Namespace):
    from .train_vision import train_vision

    return train_vision(world(given), given.work, **size(given, "vision"))


def text(given: argparse.Namespace):
    """The encoder and its words."""
    from .train_text import train_text
    from .words import Words

    scenes = world(given)
    words = Words(scenes)
    return train_text(scenes, words, given.work, **size(given, "text")), words


def base(given: argparse.Namespace):
    """Trains the text encoder first, if that is not done yet."""
    from .train_base import train_base

    encoder, words = text(given)
    return train_base(world(given), words, encoder, given.work, **size(given, "base")), words


def export(given: argparse.Namespace) -> None:
    """Trains what is not trained yet."""
    from .export import export
    from .loop import trained_for

    painter, words = base(given)
    namer = vision(given)
    lengths = {part: trained_for(given.work / part) for part in ("vision", "text", "base")}
    export(painter, namer, words, given.weights, {"command": made_by(given), "seed": 0, "trained": lengths})


def adapters(given: argparse.Namespace) -> None:
    from nested_attention.files import read_adapter, write_adapter
    from nested_attention.host.studio import load_studio

    from .adapters import CLASSES, train_adapter
    from .export import LICENSE

    for kind, name in CLASSES.items():
        made = train_adapter(
            world(given), load_studio(given.weights), kind, given.work, steps(given, "adapter"), steps(given, "start")
        )
        target, adapter = given.weights / "adapters" / f"studio_{name}.safetensors", read_adapter(made)
        told = {"command": made_by(given), "seed": 0, "warm start": steps(given, "start")}
        write_adapter(adapter, target, notes={**adapter.notes, "license": LICENSE, "made": json.dumps(told)})
        print(json.dumps({"adapter": target.name, "bytes": target.stat().st_size}))


def judge(given: argparse.Namespace):
    from .judge import train_judge

    return train_judge(world(given), given.work, **size(given, "judge"))


def trained(given: argparse.Namespace, name: str, part: float = 1.0, **changes: object) -> Path:
    """An adapter for people, trained as the one that ships but for `changes`; without any it is that one."""
    from nested_attention.host.studio import load_studio

    from .adapters import train_adapter

    long, before = max(1, round(part * steps(given, "adapter"))), steps(given, "start")
    return train_adapter(
        world(given), load_studio(given.weights), "people", given.work, long, before, name=name, **changes
    )


def rivals(given: argparse.Namespace) -> dict[tuple[str, int], Path]:
    """All ways to personalize, from two seeds each."""
    from .rivals import DecoupledObjective

    ways = {"person": {}, "decoupled": {"objective": DecoupledObjective, "value_share": 0.0}, "single": {"queries": 1}}
    return {
        (way, seed): trained(given, f"{way}-{seed}" if seed else way, seed=seed, **changes)
        for seed in SEEDS
        for way, changes in ways.items()
    }


def ablations(given: argparse.Namespace) -> dict[str, Path]:
    """One choice changed in each, all trained for a part of the steps; and the one that ships after all and one."""
    found = {"all steps": trained(given, "person"), "1 step": trained(given, "1-step", 1 / steps(given, "adapter"))}
    for name, changes in CHANGES.items():
        found[name] = trained(given, re.sub(r"\W+", "-", name), PART, **changes)
    return found


def evidence(given: argparse.Namespace) -> None:
    from nested_attention.host.studio import load_studio

    from .compare import PEOPLE, Comparison
    from .evidence import cases, without_lookup
    from .inside import inside
    from .loop import trained_for

    files, results, docs = rivals(given), HERE / "results", HERE.parent / "docs"
    results.mkdir(exist_ok=True)
    seer = judge(given)
    lengths = {"judge": trained_for(given.work / "judge"), "warm start": steps(given, "start")}
    compare = Comparison(world(given), load_studio(given.weights), seer, results, docs, given.cases, lengths)
    for seed in SEEDS:
        compare.people(seed, {way: path for (way, s), path in files.items() if s == seed})
    person, pet = files["person", 0], given.weights / "adapters" / "studio_pet.safetensors"
    compare.pets(pet)
    compare.pairs(person, pet)
    compare.two_people(person)
    compare.training(ablations(given))
    compare.drawing(person, without_lookup(person, given.work / "adapters" / "alike" / person.name))
    tops = inside(compare.base, person, cases(compare.world, 8, PEOPLE), docs / "inside.png")
    (results / "concentration.json").write_text(json.dumps(tops))


def report(given: argparse.Namespace) -> None:
    from .report import report

    print(report(HERE / "results", HERE.parent / "docs"))


STAGES = {
    stage.__name__: stage
    for stage in (pictures, vision, text, base, export, adapters, judge, rivals, ablations, evidence, report)
}

if __name__ == "__main__":
    main()
