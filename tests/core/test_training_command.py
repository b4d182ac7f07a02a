"""The command line of a training: its settings, the host that it finds, the signals that end it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nested_attention.training.config import TrainingError, from_arguments

ROOT = Path(__file__).parents[2]


def test_settings_from_a_file_and_options(tmp_path):
    values = {"data": "d", "output": "o", "text_encoders": ["l", "g"], "steps": 7}
    (tmp_path / "a.json").write_text(json.dumps(values))
    config = from_arguments(["--config", str(tmp_path / "a.json"), "--steps", "9", "--no-buckets", "--norm", "off"])
    assert (config.steps, config.text_encoders, config.buckets, config.norm) == (9, ("l", "g"), False, "off")
    if sys.version_info >= (3, 11):
        (tmp_path / "a.toml").write_text('data = "d"\noutput = "o"\nlearning_rate = 1e-3\n')
        assert from_arguments(["--config", str(tmp_path / "a.toml")]).learning_rate == 1e-3
    for text, problem in (("{", "cannot be read"), ('{"dat": 1}', "dat"), ('{"data": "d"}', "missing: output")):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(TrainingError, match=problem):
            from_arguments(["--config", str(tmp_path / "b.json")])
    (tmp_path / "b.json").write_text(r'{"data": "D:\pictures"}')
    with pytest.raises(TrainingError, match="cannot be read.*Write paths with /"):
        from_arguments(["--config", str(tmp_path / "b.json")])
    for extra, problem in (
        (["--norm", "rescale"], "sets their size"),
        (["--start-from", "a", "--norm", "off"], "keeps"),
    ):
        with pytest.raises(TrainingError, match=problem):
            from_arguments(["--data", "d", "--output", "o", "--value-share", "0.1", *extra])
    for values, problem in (
        ({"validation_prompts": "a <person>"}, "validation_prompts is 'a <person>', expected a list of texts"),
        ({"validation_prompts": ["a dog"]}, "preview_prompt.*'a dog' holds neither <person> nor the word person"),
        ({"steps": "1000"}, "steps is '1000', expected a whole number"),
        ({"learning_rate": True}, "learning_rate is True, expected a number"),
        ({"buckets": 1}, "buckets is 1, expected true or false"),
        ({"holdout": -1}, "holdout is -1, expected 0 or more"),
    ):
        (tmp_path / "c.json").write_text(json.dumps({"data": "d", "output": "o", **values}))
        with pytest.raises(TrainingError, match=problem):
            from_arguments(["--config", str(tmp_path / "c.json")])
    with pytest.raises(TrainingError, match="batch is 0"):
        from_arguments(["--data", "d", "--output", "o", "--batch", "0"])


def test_comfyui_is_found_above_the_pack(tmp_path):
    pack, comfy = tmp_path / "ComfyUI" / "custom_nodes" / "pack", tmp_path / "ComfyUI" / "comfy"
    shutil.copytree(ROOT / "nested_attention", pack / "nested_attention")
    environment = {name: value for name, value in os.environ.items() if name not in ("COMFYUI_PATH", "PYTHONPATH")}

    def python(*command):
        return subprocess.run([sys.executable, *command], cwd=pack, env=environment, capture_output=True, text=True)

    without = python("-m", "nested_attention.training", "--data", "d", "--output", "o")
    assert "Training stopped: ComfyUI was not found. Set COMFYUI_PATH to its folder." in without.stderr
    assert without.returncode == 1
    comfy.mkdir()
    (comfy / "sd.py").write_text("")
    (comfy / "cli_args.py").write_text("class args:\n    cpu = None\n")
    find = (
        "from nested_attention.training.__main__ import find_host; find_host(); import comfy.sd, comfy.cli_args as c; "
    )
    found = python("-c", find + "print(comfy.sd.__file__, c.args.cpu, sep='\\n')")
    cpu = not getattr(torch, "accelerator", torch.cuda).is_available()
    assert found.stdout.splitlines() == [str(comfy / "sd.py"), str(cpu)], found.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number):
    program = (
        "import os; from nested_attention.training.__main__ import stop_signal; stop = stop_signal(); "
        f"ask = lambda: os.kill(os.getpid(), {number:d}); print(stop(), flush=True); "
        "ask(); print(stop(), flush=True); ask(); print('goes on')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout.split(), ended.returncode) == (["False", "True"], -number), ended.stderr
