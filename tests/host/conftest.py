"""Small models of ComfyUI's real classes, made once; tests clone what they change."""

from __future__ import annotations

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
