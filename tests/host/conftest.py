"""Small models of ComfyUI's real classes, made once; tests clone what they change."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import folder_paths
import pytest
from small_models import make_adapter, make_clip, make_model, make_subject

from nested_attention.host.adapters import load_adapter
from nested_attention.host.apply import apply_subject
from nested_attention.host.layers import cross_attention_sites


@pytest.fixture(scope="session")
def base_model():
    return make_model()


@pytest.fixture(scope="session")
def base_clip():
    return make_clip()


@pytest.fixture(scope="session")
def sites(base_model):
    return cross_attention_sites(base_model.model.diffusion_model)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, sites):
    path = make_adapter(tmp_path_factory.mktemp("adapters") / "person.safetensors", sites)
    return load_adapter(str(path), path.name)


@pytest.fixture(scope="session")
def person(adapter):
    return make_subject(adapter, 3)


@pytest.fixture(scope="session")
def other(adapter):
    return make_subject(adapter, 4)


@pytest.fixture
def applied(base_model, base_clip, person):
    """Model and CLIP in which <person> stands for a subject."""
    return apply_subject(base_model, base_clip, person, placeholder="<person>")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Node classes by id, from the pack imported as the host imports it: by path, under a name of its own."""
    models = tmp_path_factory.mktemp("models")
    folder_paths.folder_names_and_paths["nested_attention"] = ([str(models / "mine")], set())
    original, folder_paths.models_dir = folder_paths.models_dir, str(models)
    spec = importlib.util.spec_from_file_location("pack under test", Path(__file__).parents[2] / "__init__.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def load():
        extension = await module.comfy_entrypoint()
        await extension.on_load()
        return {node.define_schema().node_id: node for node in await extension.get_node_list()}

    yield asyncio.run(load())
    folder_paths.models_dir = original
