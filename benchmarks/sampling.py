"""One sampling step of a full-width UNet, SD 1.5's or SDXL's, with no, one, two and four subjects.

ComfyUI's own UNet, guider (cond and uncond, one batch) and sampler, with random weights: the arithmetic costs the same
as with trained ones. Subjects come from an adapter of 1024 nested tokens, through the pack's own host code. A step is
the time from one callback of the sampler to the next, so what is done once a run is not in it; the projection of nested
keys and values is timed on its own. The variants take turns, and times are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.insert(1, os.environ.get("COMFYUI_PATH", str(ROOT / ".host" / "ComfyUI")))

from comfy.cli_args import args as host_args  # noqa: E402

host_args.cpu = not torch.cuda.is_available()

import comfy.ldm.modules.attention as host_attention  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy.model_patcher import CoreModelPatcher, ModelPatcher  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402

from benchmarks.measure import machine, now, results_file, seconds, spread, table, write_results  # noqa: E402
from nested_attention.adapter import AdapterConfig, NestedAdapter  # noqa: E402
from nested_attention.host import KEY  # noqa: E402
from nested_attention.host.adapters import LoadedAdapter  # noqa: E402
from nested_attention.host.layers import cross_attention_sites  # noqa: E402
from nested_attention.host.marks import Mark, Section, digest  # noqa: E402
from nested_attention.host.run import AppliedSubject, Personalization, Run  # noqa: E402
from scripts.unets import UNET_COMMON, UNET_SD15, UNET_SDXL  # noqa: E402

MODELS = {
    "sd15": (comfy.supported_models.SD15, comfy.model_base.BaseModel, UNET_SD15),
    "sdxl": (comfy.supported_models.SDXL, comfy.model_base.SDXL, UNET_SDXL),
}
TEXT, NESTED = 77, 1024
SIGMAS = (8.0, 4.0, 2.0, 0.0)
VARIANTS = {  # how many subjects, and whether their keys and values lie in main memory
    "no patch": (0, False), "1 subject": (1, False), "1, low_memory": (1, True), "2 subjects": (2, False),
    "4 subjects": (4, False),
}  # fmt: skip


def settle(module: torch.nn.Module) -> None:
    """Random weights that keep activations of the order of one."""
    make = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        bound = (3 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 1.0
        weight.data.uniform_(-bound, bound, generator=make)


def make_model(name: str, dtype: torch.dtype) -> ModelPatcher:
    kind, build, unet = MODELS[name]
    config = kind({**UNET_COMMON, **unet, "use_temporal_attention": False, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    model = build(config, device=torch.device("cpu"))
    settle(model.diffusion_model)
    device = comfy.model_management.get_torch_device()
    return CoreModelPatcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())


def make_adapter(model: ModelPatcher) -> LoadedAdapter:
    sites = cross_attention_sites(model.model.diffusion_model)
    layers = tuple(site.inner for site in sites)
    former = {"image_dim": 1280, "dim": 64, "depth": 1, "heads": 1, "dim_head": 64}  # its size plays no part here
    config = AdapterConfig(**former, queries=NESTED, output_dim=sites[0].context, layers=layers)
    adapter = NestedAdapter(config, operations=comfy.ops.manual_cast)
    settle(adapter)
    patcher = CoreModelPatcher(adapter, model.load_device, model.offload_device)
    return LoadedAdapter(patcher, config, "benchmark", "benchmark")


def make_subjects(adapter: LoadedAdapter, count: int, low_memory: bool = False) -> list[AppliedSubject]:
    tokens = torch.randn(count, 1, NESTED, adapter.config.output_dim)
    return [AppliedSubject(f"<{i}>", tokens[i], adapter, low_memory=low_memory) for i in range(count)]


def patched(model: ModelPatcher, subjects: list[AppliedSubject]) -> ModelPatcher:
    """What nested_attention.host.apply does to a model."""
    model = model.clone()
    if subjects:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, Personalization(tuple(subjects), ()))
    return model


def make_guider(model: ModelPatcher, subjects: list[AppliedSubject], texts: Tensor) -> comfy.samplers.CFGGuider:
    """Guider over a prompt with the subjects' tokens, and one without."""
    marks = tuple(Mark(s.placeholder, 3 + i, 1.0, texts[0, 3 + i]) for i, s in enumerate(subjects))
    record = {KEY: [Section(digest(texts[0]), TEXT, marks)]} if marks else {}
    guider = comfy.samplers.CFGGuider(model)
    pooled = {"pooled_output": torch.zeros(1, 1280)}  # which SDXL wants
    guider.set_conds([[texts[:1], {**pooled, **record}]], [[texts[1:], pooled]])
    guider.set_cfg(7.0)
    return guider


def step_seconds(guider: comfy.samplers.CFGGuider, noise: Tensor) -> list[float]:
    """Seconds of each step of a run but the first, in which caches fill."""
    ends: list[float] = []

    def stamp(*_: Any) -> None:
        ends.append(now())

    euler = comfy.samplers.sampler_object("euler")
    guider.sample(
        noise, torch.zeros_like(noise), euler, torch.tensor(SIGMAS), callback=stamp, disable_pbar=True, seed=1
    )
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """The host's attention; its UNet and our patch both look it up at each call."""
    before = host_attention.optimized_attention
    host_attention.optimized_attention = host_attention.get_attention_function(name)
    try:
        yield
    finally:
        host_attention.optimized_attention = before


def measure_steps(model: ModelPatcher, adapter: LoadedAdapter, latent: int, runs: int) -> dict[str, list[float]]:
    texts, noise = torch.randn(2, TEXT, adapter.config.output_dim), torch.randn(1, 4, latent, latent)
    guiders = {}
    for name, (count, low_memory) in VARIANTS.items():
        subjects = make_subjects(adapter, count, low_memory)
        guiders[name] = make_guider(patched(model, subjects), subjects, texts)
    times: dict[str, list[float]] = {name: [] for name in guiders}
    step_seconds(guiders["no patch"], noise)
    for run in range(runs):
        for name, guider in guiders.items():
            times[name] += step_seconds(guider, noise)
        print(f"run {run + 1} of {runs}", file=sys.stderr)
    return times


def projection_seconds(model: ModelPatcher, adapter: LoadedAdapter, runs: int) -> float:
    """Nested keys and values of one subject in all layers: once a run."""
    run = Run(model, make_subjects(adapter, 1))
    return statistics.median(seconds(run.project) for _ in range(runs))


def rows(name: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    plain = statistics.median(times["no patch"])
    return [
        {
            "backend": name,
            "variant": variant,
            "step s": statistics.median(taken),
            "ratio": f"{statistics.median(taken) / plain:.3f}",
            "spread": f"{spread(taken):.0%}" if len(taken) > 3 else "–",
        }
        for variant, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="latents of 16 x 16, one run, one backend")
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--latent", type=int, help="height and width of the latent; default 32, on a GPU 64 or 128")
    parser.add_argument("--runs", type=int, help="runs of each variant, two timed steps each; default 7")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/sampling-MODEL-DEVICE.json")
    parser.add_argument(
        "--threads", type=int, help="of torch on the CPU; default all cores. With 1 processor time is measured"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    cuda = torch.cuda.is_available()
    latent = arguments.latent or (16 if arguments.quick else (128 if arguments.model == "sdxl" else 64) if cuda else 32)
    runs = arguments.runs or (1 if arguments.quick else 7)
    dtype = torch.float16 if cuda else torch.float32
    about = {**machine(), "model": arguments.model, "dtype": str(dtype), "latent": latent, "runs": runs}
    lines = []
    with torch.inference_mode():
        torch.manual_seed(0)
        model = make_model(arguments.model, dtype)
        adapter = make_adapter(model)
        for name in ("pytorch",) if cuda or arguments.quick else ("sub_quad", "pytorch"):
            with backend(name):
                lines += rows(name, measure_steps(model, adapter, latent, runs))
        projection = projection_seconds(model, adapter, runs)
    print(table(lines) + f"\n\nProjecting the nested keys and values of a subject, once a run: {projection:.2f} s")
    output = arguments.output or results_file(
        f"sampling-{arguments.model}-{'cuda' if cuda else 'cpu'}", arguments.quick
    )
    write_results(output, machine=about, steps=lines, projection_s=projection)


if __name__ == "__main__":
    main()
