"""The library's core needs no ComfyUI; only `nested_attention.host` and the nodes import it."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED = {"torch", "einops", "safetensors"} | set(sys.stdlib_module_names)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_core_modules_import_only_their_packages():
    modules = sorted((ROOT / "nested_attention").glob("*.py"))
    assert modules
    for path in modules:
        foreign = {name for name in imports(path) if name.split(".")[0] not in ALLOWED}
        assert not foreign, f"{path.name} imports {foreign}"


def test_core_runs_where_comfyui_cannot_be_imported():
    names = [f"nested_attention.{path.stem}" for path in (ROOT / "nested_attention").glob("*.py")]
    code = f"import sys; sys.modules['comfy'] = None; import {', '.join(names)}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_code_is_loaded_from_files_or_run_from_strings():
    for path in [*(ROOT / "nested_attention").rglob("*.py"), *(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in {"eval", "exec", "os.system"} and "subprocess" not in called, f"{path}: {called}"
            if called == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), path
