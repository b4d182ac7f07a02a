"""The training loop: resumed, killed, shared between processes, out of disk, it is the same training."""

import ast
import copy
import math
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_training import Recording, make_trainer, settings

from nested_attention.training.checkpoint import load_checkpoint, save_checkpoint
from nested_attention.training.config import TrainingError
from nested_attention.training.loss import diffusion_loss, loss_weight, snr_of
from nested_attention.training.progress import loss_curve, read_losses
from nested_attention.training.troubles import BrokenEntry

ROOT = Path(__file__).parents[2]


def test_the_modules_need_no_comfyui():
    """Pillow, the host and TensorBoard are imported by the functions that need them."""
    for path in (ROOT / "nested_attention" / "training").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                allowed = {"torch", "einops", "safetensors", *sys.stdlib_module_names}
                assert {name.split(".")[0] for name in names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert "host" not in (node.module or ""), path


def start(folder, *, steps=12, batch=2, accumulation=1, pause=0.0, **environment):
    command = [sys.executable, str(ROOT / "tests/support/toy_training.py"), *map(str, (folder, steps, batch))]
    environment = {"CUDA_VISIBLE_DEVICES": "", **environment}  # two processes cannot share a GPU
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}", **environment}
    return subprocess.Popen([*command, str(accumulation), str(pause)], env=environment)


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_losses(Path(folder) / "loss.jsonl")]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_killed_and_resumed_is_uninterrupted(tmp_path, accumulation):
    straight, resumed = (settings(tmp_path / name, accumulation=accumulation) for name in ("straight", "killed"))
    killed = start(tmp_path / "killed", accumulation=accumulation, pause=0.1)
    while len(losses(tmp_path / "killed")) < 5:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() != 0
    assert load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["step"] in (3, 6, 9)
    states = []
    for config in (straight, resumed):
        trainer = make_trainer(config)
        assert trainer.run()
        states.append({name: trainer.state()[name] for name in ("adapter", "average", "optimizer")})
    assert [step for step, _ in losses(tmp_path / "killed")] == list(range(1, 13))
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    """Also with accumulated gradients: two steps of two micro-batches of two rows."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(tmp_path / "two", steps=2, batch=1, accumulation=2, RANK=str(r), **common) for r in range(2)]
    (tmp_path / "one").mkdir()
    one = make_trainer(settings(tmp_path / "one", steps=2, batch=2, accumulation=2), Recording)
    assert one.run() and [process.wait() for process in ranks] == [0, 0]
    expected = torch.load(tmp_path / "one" / "gradients-0.pt", weights_only=True)
    for rank in range(2):
        gradients = torch.load(tmp_path / "two" / f"gradients-{rank}.pt", weights_only=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"))
    two = load_checkpoint(tmp_path / "two" / "checkpoint.pt")
    torch.testing.assert_close(two["average"], dict(one.average.state_dict()))
    assert two["skipped"] == [0, 1]


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    make_trainer(settings(tmp_path, steps=1, batch=1, accumulation=4), Recording).run()
    whole = make_trainer(settings(tmp_path, batch=1))
    rows = [row for number in range(4) for row in whole.reader.plan.rows(number)]
    whole.objective(whole.project, [whole.reader(row) for row in rows]).backward()
    gradients = torch.load(tmp_path / "gradients-0.pt", weights_only=True)
    torch.testing.assert_close(gradients, {name: p.grad for name, p in whole.adapter.named_parameters()})


@pytest.mark.parametrize("part", [0.0, 0.25, 4.0])
def test_gradients_are_clipped_to_a_norm(tmp_path, part):
    """Down to a part of their own norm, never up to it; 0 clips none. Adam's first mean is a tenth of what is left."""
    make_trainer(settings(tmp_path / "found", steps=1, clip_norm=0.0), Recording).run()
    gradients = torch.load(tmp_path / "found" / "gradients-0.pt", weights_only=True)
    norm = torch.cat([g.flatten() for g in gradients.values()]).square().sum().sqrt().item()
    trainer = make_trainer(settings(tmp_path / "clipped", steps=1, clip_norm=part * norm))
    trainer.run()
    means = {name: trainer.optimizer.state[p]["exp_avg"] for name, p in trainer.adapter.named_parameters()}
    kept = {0.0: 0.1, 0.25: 0.025, 4.0: 0.1}[part]
    torch.testing.assert_close(means, {name: kept * g for name, g in gradients.items()}, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("ema", "keeps"), [(0.999, (1 / 11, 2 / 12, 3 / 13)), (0.1, (1 / 11, 0.1, 0.1)), (0.0, (0,) * 3)]
)
def test_the_running_mean_of_the_weights(tmp_path, ema, keeps):
    """It keeps n / (n + 10) of itself at step n, and at most `ema`."""
    trainer = make_trainer(settings(tmp_path, steps=3, ema=ema))
    weights = [copy.deepcopy(trainer.adapter.state_dict())]
    trainer.watch = lambda step, line: weights.append(copy.deepcopy(trainer.adapter.state_dict()))
    assert trainer.run()
    for name, mean in weights[0].items():
        for keep, now in zip(keeps, weights[1:], strict=True):
            mean = keep * mean + (1 - keep) * now[name]
        torch.testing.assert_close(trainer.average.state_dict()[name], mean)
        assert not torch.equal(weights[1][name], weights[0][name])


def test_stop_keeps_what_was_learnt(tmp_path):
    trainer = make_trainer(settings(tmp_path))
    assert not trainer.run(stop=lambda: trainer.step == 4)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5
    again = make_trainer(settings(tmp_path))
    assert again.run() and again.step == 12


@pytest.mark.parametrize(
    ("schedule", "now", "said"),
    [
        ("constant", {"steps": 5}, ""),
        ("constant", {"steps": 5, "batch": 1}, "batch: 1, was 2"),
        ("constant", {"batch": 1}, ""),
        ("cosine", {"steps": 5}, "steps: 5, was 4"),
        ("cosine", {"cache": "memory"}, ""),
    ],
)
def test_going_on_with_other_settings_is_said(tmp_path, caplog, schedule, now, said):
    """More steps are the same training only where its rates do not follow from their number."""
    make_trainer(settings(tmp_path, steps=4, schedule=schedule)).run()
    make_trainer(settings(tmp_path, **{"steps": 4, "schedule": schedule} | now)).run()
    assert ("goes on with other settings than it had: " + said in caplog.text) if said else not caplog.records


def test_a_start_that_would_be_left_out_is_refused(tmp_path, caplog):
    """A run goes on from its checkpoint, wherever it was to begin; of another file of the same name it is said."""
    make_trainer(settings(tmp_path, steps=4, start_from="old/a.safetensors")).run()
    for start in ("", "new/a.safetensors"):
        again = make_trainer(settings(tmp_path, steps=5, start_from=start))
        assert again.run() and again.config.record()["start_from"] == "a.safetensors"
    with pytest.raises(TrainingError, match="began from a.safetensors, not from b.safetensors"):
        make_trainer(settings(tmp_path, steps=6, start_from="b.safetensors")).run()
    assert not caplog.records
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    for start, said in ((None, ""), ("that of other weights", "another a.safetensors to start from")):
        save_checkpoint(
            tmp_path / "checkpoint.pt", {k: v for k, v in {**state, "start": start}.items() if v is not None}
        )
        assert make_trainer(settings(tmp_path, steps=6, start_from="other/a.safetensors")).run()
        assert caplog.text.endswith(f"it had: {said}. Another output (of the node: name) begins anew.\n") if said else 1
        assert bool(caplog.records) == bool(said)


@contextmanager
def full_disk(at: int = 4096):
    """No file can grow beyond some bytes: writing fails in the middle, as on a full disk."""
    resource = pytest.importorskip("resource")  # which Windows lacks
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    with full_disk(), pytest.raises(OSError):
        save_checkpoint(path, {"step": 2, "large": torch.zeros(100_000)})
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_stops_or_is_counted(tmp_path, caplog):
    make_trainer(settings(tmp_path, steps=3)).run()
    with full_disk(), pytest.raises(TrainingError, match="checkpoint of step 6 could not be written.*still there"):
        make_trainer(settings(tmp_path)).run()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    trainer = make_trainer(settings(tmp_path, on_error="skip"))
    with full_disk():
        assert trainer.run()
    assert trainer.troubles.count == 3 and "Skipped (3 so far): The checkpoint of step 12" in caplog.text
    assert "The loss curve of step 12 could not be written" in caplog.text  # which no training needs
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def test_a_full_disk_at_the_start_is_named(tmp_path):
    """Of a fresh training, and of one that goes on."""
    for steps in (0, 3):
        with full_disk(at=10), pytest.raises(TrainingError, match=f"folder {tmp_path} cannot be written: .* Make room"):
            make_trainer(settings(tmp_path, on_error="skip")).run()
        assert len(losses(tmp_path)) == steps
        make_trainer(settings(tmp_path, steps=3)).run()


@pytest.mark.parametrize("content", ["hello", "cut", "", "pickle"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "settings": {}, "weight": torch.zeros(5000)})
    whole = path.read_bytes()
    path.write_bytes({"hello": b"hello", "cut": whole[:5000], "pickle": b"\x80\x04."}.get(content, b""))
    with pytest.raises(ValueError, match="checkpoint.pt cannot be read .* choose another output to begin anew"):
        make_trainer(settings(tmp_path)).run()


def test_damaged_losses_are_left_out(tmp_path):
    make_trainer(settings(tmp_path, steps=3)).run()
    with (tmp_path / "loss.jsonl").open("ab") as file:
        file.write(b'[1]\n"\xff"\n{"loss": 1}\n{"step": ')
    make_trainer(settings(tmp_path, steps=4)).run()
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]


def test_validated_is_what_is_saved(tmp_path):
    seen = []
    trainer = make_trainer(settings(tmp_path, steps=2), validate=lambda step, adapter: seen.append(adapter) or {})
    assert trainer.run() and seen and all(adapter is trainer.average for adapter in seen)


def test_other_settings_are_said_and_another_adapter_is_refused(tmp_path, caplog):
    make_trainer(settings(tmp_path, steps=3)).run()
    make_trainer(settings(tmp_path, steps=4, learning_rate=1e-3)).run()
    assert "other settings than it had: learning_rate: 0.001, was 0.01." in caplog.text
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", {**state, "adapter": {"x": torch.zeros(1)}})
    with pytest.raises(TrainingError, match="another shape"):
        make_trainer(settings(tmp_path)).run()


def test_the_qformer_has_a_rate_of_its_own(tmp_path):
    """At factor 0 it stays as it is, which Adam's steps of one size would not leave it at any small gradient."""
    trainer = make_trainer(settings(tmp_path, qformer_rate=0.0, weight_decay=0.0))
    before = {name: value.clone() for name, value in trainer.adapter.state_dict().items()}
    assert trainer.run()
    changed = {name for name, value in trainer.adapter.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("layers.") for name in changed), changed


def test_going_on_with_other_rates(tmp_path, caplog):
    """Weight decay, the Q-Former's own rate and the precision may change; moments go on, settings are the new ones."""
    make_trainer(settings(tmp_path, steps=3)).run()
    trainer = make_trainer(settings(tmp_path, weight_decay=0.5, qformer_rate=0.1, steps=4))
    trainer.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5}
    assert all(state["step"] == 3 for state in trainer.optimizer.state.values())
    assert trainer.run()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([1e-3, 1e-2])


def test_machines_that_do_not_share_their_checkpoint(tmp_path):
    trainer = make_trainer(settings(tmp_path))
    trainer.mean = lambda values: values + 250
    with pytest.raises(TrainingError, match="folder that all machines share"):
        trainer.run()


def test_what_was_done_before_a_broken_picture_is_kept(tmp_path, monkeypatch):
    trainer = make_trainer(settings(tmp_path, checkpoint_every=100))
    broken, read = trainer.reader.plan.rows(4), type(trainer.reader).__call__

    def read_or_fail(reader, row):
        if row in broken:
            raise BrokenEntry("4.png: truncated.")
        return read(reader, row)

    monkeypatch.setattr(type(trainer.reader), "__call__", read_or_fail)
    with pytest.raises(BrokenEntry):
        trainer.run()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == trainer.step == 4


def test_the_rate_rises_and_falls(tmp_path):
    rates = {}
    for schedule in ("constant", "cosine"):
        trainer = make_trainer(settings(tmp_path / schedule, schedule=schedule))
        rates[schedule] = []
        trainer.watch = lambda step, line, t=trainer, r=rates[schedule]: r.append(t.optimizer.param_groups[0]["lr"])
        assert trainer.run()
    assert rates["constant"] == pytest.approx([1e-2 / 3, 2e-2 / 3] + [1e-2] * 10)
    falling = [1e-2 * math.cos(math.pi * i / 18) ** 2 for i in range(9)]  # half of one and the cosine
    assert rates["cosine"] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2] + falling)


def test_a_loss_that_is_no_number_stops(tmp_path):
    trainer = make_trainer(settings(tmp_path))
    trainer.objective = lambda project, samples: project(torch.cat([s.crop for s in samples]))[0][0].sum() * torch.nan
    with pytest.raises(TrainingError, match="loss of step 1 is nan"):
        trainer.run()


def test_a_gradient_that_is_no_number_stops(tmp_path):
    """A root at zero: the loss is 0, its slope is not finite."""
    trainer = make_trainer(settings(tmp_path, clip_norm=0.0))
    trainer.objective = lambda project, samples: (0 * project(torch.cat([s.crop for s in samples]))[0][0]).sum().sqrt()
    with pytest.raises(TrainingError, match="gradient of step 1 is nan"):
        trainer.run()


def rows_of(picture, color):
    """The mean row of a color's pixels in each quarter of the plot, from left to right."""
    rows, columns = np.nonzero((np.asarray(picture)[51:349, 51:749] == color).all(-1))
    return [rows[(columns >= left) & (columns < left + 175)].mean() for left in range(0, 700, 175)]


def test_a_falling_loss_is_drawn_falling():
    """And a rising validation rising; a picture's rows are counted from above."""
    lines = [{"step": step, "loss": 2 - step / 100, "validation": 1 + step / 100} for step in range(1, 101)]
    picture = loss_curve(lines)
    falling, rising = rows_of(picture, (31, 63, 119)), rows_of(picture, (192, 57, 43))
    assert falling == sorted(falling) and falling[-1] > falling[0] + 100
    assert rising == sorted(rising, reverse=True) and rising[-1] < rising[0] - 100


def test_losses_are_those_of_each_target():
    """epsilon: the noise. v: alpha eps - sigma x. flow: eps - x. Each from the clean picture that a model predicts."""
    make = torch.Generator().manual_seed(0)
    clean, noise, wrong = torch.randn(3, 4, 2, 3, 3, generator=make, dtype=torch.float64)
    sigma = torch.tensor([0.03, 0.5, 2.0, 14.0], dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    noisy, alpha = clean + s * noise, (s**2 + 1) ** -0.5
    v = alpha * noise - s * alpha * clean
    cases = {
        "epsilon": (noisy - s * (noise + wrong), sigma, sigma**-2),
        "v": (noisy * alpha**2 - s * alpha * (v + wrong), sigma * alpha.flatten(), sigma**-2),
        "flow": (clean - s * wrong, sigma, ((1 - sigma) / sigma) ** 2),
    }
    error = wrong.square().flatten(1).mean(1)
    for name, (denoised, scale, snr) in cases.items():
        plain = diffusion_loss(denoised.double(), clean, loss_weight(scale, snr, 0.0))
        torch.testing.assert_close(plain, error.mean().to(plain), rtol=1e-3, atol=1e-4, msg=name)
    capped = loss_weight(sigma, snr_of(torch.ones_like(sigma), sigma), 5.0)
    torch.testing.assert_close(capped * sigma**2, (sigma**-2).clamp_max(5) / sigma**-2)  # min(snr, 5) / snr on epsilon


def test_losses_go_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    """From a checkpoint on, in place of what came after it."""
    boards = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            boards.append({"folder": folder, "from": purge_step, "losses": []})

        def add_scalar(self, name, value, step):
            if name == "loss":
                boards[-1]["losses"].append((step, value))

        def close(self):
            boards[-1]["closed"] = True

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    for steps in (3, 5):
        assert make_trainer(settings(tmp_path, steps=steps)).run()
    assert [board["from"] for board in boards] == [1, 4] and all(board["closed"] for board in boards)
    assert boards[0]["losses"] + boards[1]["losses"] == losses(tmp_path) and len(losses(tmp_path)) == 5
    assert {board["folder"] for board in boards} == {str(tmp_path / "tensorboard")}
