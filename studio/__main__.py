"""Makes a small model to ship with the pack: `python -m studio [STAGE ...]`, each of which goes on where it was.

Stages, in order: pictures, vision, base, export, adapters, which make what ships, and judge, rivals, evidence, which
measure it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from nested_attention.training.__main__ import find_host

HERE = Path(__file__).parent
STEPS = {"vision": 700, "base": 3000, "told": 2000, "start": 800, "adapter": 500, "judge": 500}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studio", description=__doc__)
    parser.add_argument("stages", nargs="*", default=list(STAGES), choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--work", type=Path, default=HERE / "build", help="folder of what is made on the way")
    parser.add_argument("--weights", type=Path, default=HERE.parent / "weights", help="folder of what ships")
    parser.add_argument("--steps", type=int, help="of each training, in place of its own number")
    parser.add_argument("--cases", type=int, default=64, help="pictures for each row of the evidence")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; all by default")
    given = parser.parse_args()
    find_host()
    import torch
    from comfy.cli_args import args

    args.cpu = True  # it is small enough
    if given.threads:
        torch.set_num_threads(given.threads)
    for stage in given.stages:
        print(f"== {stage}", flush=True)
        STAGES[stage](given)


def world(given: argparse.Namespace):
    from .scenes import World

    return World(given.work)


def steps(given: argparse.Namespace, stage: str) -> int:
    return given.steps or STEPS[stage]


def pictures(given: argparse.Namespace) -> None:
    from .pictures import photos

    world(given)
    photos(given.work, HERE.parent / "assets")


def vision(given: argparse.Namespace):
    from .train_vision import train_vision

    return train_vision(world(given), given.work, steps(given, "vision"))


def base(given: argparse.Namespace):
    from .train_base import train_base
    from .words import Words

    scenes = world(given)
    words = Words(scenes)
    return train_base(scenes, words, given.work, steps(given, "base"), steps(given, "told")), words


def export(given: argparse.Namespace) -> None:
    """Trains what is not trained yet."""
    from .export import export

    painter, words = base(given)
    notes = {
        "command": "python -m studio",
        "seed": 0,
        "steps": {k: steps(given, k) for k in ("vision", "base", "told")},
    }
    export(painter, vision(given), words, given.weights, notes)


def adapters(given: argparse.Namespace) -> None:
    from nested_attention.host.studio import load_studio

    from .adapters import CLASSES, train_adapter

    for kind, name in CLASSES.items():
        made = train_adapter(
            world(given), load_studio(given.weights), kind, given.work, steps(given, "adapter"), steps(given, "start")
        )
        target = given.weights / "adapters" / f"studio_{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, target)
        print(json.dumps({"adapter": target.name, "bytes": target.stat().st_size}))


def judge(given: argparse.Namespace):
    from .judge import train_judge

    return train_judge(world(given), given.work, steps(given, "judge"))


def rivals(given: argparse.Namespace) -> dict[str, Path]:
    """The other ways to personalize, trained as the shipped adapter was."""
    from nested_attention.host.studio import load_studio

    from .adapters import train_adapter
    from .rivals import DecoupledObjective

    how = {"person": {}, "decoupled": {"objective": DecoupledObjective}, "single": {"queries": 1}}
    return {
        name: train_adapter(
            world(given),
            load_studio(given.weights),
            "people",
            given.work,
            steps(given, "adapter"),
            steps(given, "start"),
            name=name,
            **changes,
        )
        for name, changes in how.items()
    }


def evidence(given: argparse.Namespace) -> None:
    from nested_attention.host.studio import load_studio

    from . import evidence
    from .report import report

    files = rivals(given)
    methods = {
        "none": evidence.nobody,
        "nested": evidence.nested(files["person"]),
        "single": evidence.nested(files["single"]),
        "decoupled": evidence.decoupled(files["decoupled"]),
    }
    pet = given.weights / "adapters" / "studio_pet.safetensors"
    pairs = {
        "none": evidence.nobody,
        "nested": evidence.nested(files["person"], pet),
        "competition": evidence.nested(files["person"], pet, competition=2.0),
    }
    scenes, base, seer, results = world(given), load_studio(given.weights), judge(given), HERE / "results"
    results.mkdir(exist_ok=True)
    one, two = (evidence.cases(scenes, given.cases, 0, kinds) for kinds in (("people",), ("people", "animals")))
    evidence.run(scenes, base, seer, methods, one, results / "people-seed-0.json")
    evidence.run(scenes, base, seer, pairs, two, results / "pairs-seed-0.json", strengths=(1.0,))
    settings = (
        f"All methods were trained for {steps(given, 'adapter')} steps of 16 on the same pairs from seed 0, after a "
        f"warm start of {steps(given, 'start')} steps of the Q-Former, the same for each number of tokens."
    )
    print(report(results, HERE.parent / "docs", settings))


STAGES = {stage.__name__: stage for stage in (pictures, vision, base, export, adapters, judge, rivals, evidence)}

if __name__ == "__main__":
    main()
