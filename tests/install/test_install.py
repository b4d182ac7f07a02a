"""A fresh installation on the real server: an awkward folder, and one with model folders of its own."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

pytest.importorskip("aiohttp")

from blueprint import instead_of_apply, problems
from served import Studio, change, ids, pixels_of

from scripts.client import NodeError, Prompt
from scripts.environment import ROOT
from scripts.server import running_server
from scripts.workflow import read_graph, to_prompt

AWKWARD = "nested attention"  # a space in its name
SHIPPED = ["studio_person.safetensors", "studio_pet.safetensors"]


@dataclass(frozen=True)
class Installed(Studio):
    """A server with nothing but the pack, which lies in `pack`."""

    pack: Path
    before: dict[str, tuple[int, int]]
    log: Path

    def choices(self, node: str, name: str) -> list[str]:
        kind, options = self.client.object_info()[node]["input"]["required"][name][:2]
        return options["options"] if kind == "COMBO" else kind

    def quickstart(self) -> Prompt:
        """The quickstart workflow as it is packed, up to its first picture."""
        prompt = to_prompt(read_graph(self.pack / "workflows" / "quickstart.json"), self.info)
        return with_sources(prompt, ids(prompt, "SaveImage")[0])


@pytest.fixture(scope="module")
def awkward(install, tmp_path_factory) -> Iterator[Installed]:
    """In a folder with a space in its name that cannot be written, on a server started from elsewhere."""
    host, pack = install(AWKWARD)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    log = elsewhere / "log.txt"
    make_read_only(host.base / "custom_nodes")
    before = listing(pack)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
            with running_server(host, log_path=log, folder=elsewhere) as client:
                upload_photos(client, pack)
                yield Installed(client, client.object_info(), pack, before, log)
    finally:
        make_writable(host.base / "custom_nodes")


@pytest.fixture(scope="module")
def furnished(install) -> Iterator[Installed]:
    """With an adapter in the usual folder and one in a folder that extra_model_paths.yaml names."""
    host, pack = install("nested-attention")
    shared = host.base / "shared"
    for folder, name in ((shared / "adapters", "shared"), (host.models / "nested_attention", "own")):
        folder.mkdir(parents=True)
        shutil.copy(pack / "weights" / "adapters" / SHIPPED[0], folder / f"{name}.safetensors")
    paths = host.base / "extra_model_paths.yaml"
    paths.write_text(json.dumps({"shared": {"base_path": str(shared), "nested_attention": "adapters"}}))
    log = host.base / "log.txt"
    with running_server(host, ["--extra-model-paths-config", str(paths)], log) as client:
        upload_photos(client, pack)
        yield Installed(client, client.object_info(), pack, {}, log)


@pytest.fixture(scope="module")
def drawn(awkward):
    return awkward.draw(awkward.quickstart())


def test_every_node_is_there(awkward):
    nodes = {name for name, info in awkward.info.items() if info["python_module"] == f"custom_nodes.{AWKWARD}"}
    assert nodes == {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    assert "Traceback" not in awkward.log.read_text(encoding="utf-8", errors="replace")


def test_the_quickstart_draws(drawn):
    assert drawn.std() > 10


def test_without_files_the_lists_say_what_there_is(awkward):
    assert awkward.choices("NestedAttentionLoadAdapter", "adapter_name") == SHIPPED
    assert awkward.choices("NestedAttentionLoadSubject", "subject_name") == [
        "(none in models/nested_attention_subjects)"
    ]


def test_loading_the_line_that_stands_for_no_subject_says_where_to_put_one(awkward):
    (none,) = awkward.choices("NestedAttentionLoadSubject", "subject_name")
    prompt = awkward.quickstart()
    load = {"class_type": "NestedAttentionLoadSubject", "inputs": {"subject_name": none}}
    change(prompt, "NestedAttentionApplySubject", subject=["1000", 0])
    with pytest.raises(NodeError, match=r"Put one into .*nested_attention_subjects"):
        awkward.client.run({**prompt, "1000": load})


def test_the_blueprint_is_listed_and_fits_the_nodes(awkward):
    assert problems(served_blueprint(awkward), awkward.info) == []


def test_the_blueprint_draws_what_its_nodes_draw(awkward):
    """With another seed than before: ComfyUI's cache sees that the prompts are the same."""
    plain = awkward.quickstart()
    change(plain, "KSampler", seed=5)
    personalized = instead_of_apply(served_blueprint(awkward), plain, awkward.info)
    picture = awkward.draw(personalized)
    (png,) = awkward.client.run(plain)
    assert picture.std() > 10 and (picture == pixels_of(png)).all()


def test_adapters_of_every_folder_are_listed_and_usable(furnished, drawn):
    listed = furnished.choices("NestedAttentionLoadAdapter", "adapter_name")
    assert sorted(listed) == ["own.safetensors", "shared.safetensors", *SHIPPED]
    for name in ("own.safetensors", "shared.safetensors"):
        prompt = furnished.quickstart()
        change(prompt, "NestedAttentionLoadAdapter", adapter_name=name)
        assert (furnished.draw(prompt) == drawn).all()


def test_help_templates_and_texts_are_served(furnished):
    """Not asked of the awkward folder: ComfyUI serves no files of packs whose folder has a space in its name."""
    for path in (
        "/extensions/nested-attention/docs/NestedAttentionApplySubject.md",
        "/extensions/nested-attention/docs/NestedAttentionApplySubject/zh.md",
        "/api/workflow_templates/nested-attention/quickstart.json",
    ):
        assert requests.get(furnished.client.address + path, timeout=60).ok, path
    templates = furnished.client.get("/workflow_templates")["nested-attention"]
    assert set(templates) == {path.stem for path in (furnished.pack / "workflows").glob("*.json")}
    assert "NestedAttentionApplySubject" in furnished.client.get("/i18n")["zh"]["nodeDefs"]


def test_nothing_is_written_into_the_pack(awkward, drawn):
    assert listing(awkward.pack) == awkward.before


def served_blueprint(server: Installed) -> dict:
    """The subgraph as the server hands it to the front end."""
    listed = server.client.get("/global_subgraphs")
    (key,) = (key for key, entry in listed.items() if entry["info"]["node_pack"] == f"custom_nodes.{AWKWARD}")
    assert listed[key]["name"] == "Personalize"
    return json.loads(server.client.get(f"/global_subgraphs/{key}")["data"])


def with_sources(prompt: Prompt, node_id: str) -> Prompt:
    """A node and all that it needs."""
    needed, unread = set(), [node_id]
    while unread:
        needed.add(unread[-1])
        unread += [value[0] for value in prompt[unread.pop()]["inputs"].values() if isinstance(value, list)]
    return {key: node for key, node in prompt.items() if key in needed}


def upload_photos(client, pack: Path) -> None:
    for photo in (pack / "assets").glob("*.png"):
        client.upload_image(photo)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with when it changed and its size."""
    entries = {str(path.relative_to(folder)): path.stat() for path in [folder, *folder.rglob("*")]}
    return {name: (entry.st_mtime_ns, entry.st_size) for name, entry in entries.items()}


def make_read_only(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def make_writable(folder: Path) -> None:
    """So that the temporary folder can be removed."""
    folder.chmod(folder.stat().st_mode | stat.S_IWUSR)
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
