"""The client and the server's process, with nodes that every ComfyUI has."""

import pytest

pytest.importorskip("aiohttp")

from scripts.client import Interrupted, NodeError, ServerError
from scripts.environment import ROOT, ensure_host
from scripts.server import running_server

PHOTO = ROOT / "assets" / "astronaut.png"


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def scale(source, size, method="nearest-exact"):
    return node("ImageScale", image=[source, 0], width=size, height=size, upscale_method=method, crop="disabled")


def save(source):
    return node("SaveImage", images=[source, 0], filename_prefix="test_server")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with running_server(ensure_host(), ["--output-directory", str(folder)], folder / "log.txt") as client:
        client.upload_image(PHOTO)
        yield client


def test_a_run_reports_its_nodes_and_gives_its_pictures(client):
    seen = []
    prompt = {"1": node("LoadImage", image=PHOTO.name), "2": scale("1", 16), "3": save("2")}
    (png,) = client.run(prompt, seen.append)
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20], "big") == 16
    assert {progress.node_id for progress in seen} <= set(prompt)


def test_refused_inputs_name_the_node(client):
    with pytest.raises(NodeError, match="no-such.png") as caught:
        client.queue({"1": node("LoadImage", image="no-such.png"), "2": save("1")})
    assert (caught.value.node_id, caught.value.class_type) == ("1", "LoadImage")


def test_unknown_nodes_are_refused(client):
    with pytest.raises(ServerError, match="NoSuchNode"):
        client.queue({"1": node("NoSuchNode")})


def test_failures_while_running_name_the_node(client):
    mask = node("SolidMask", value=1.0, width=8, height=8)
    nothing = node("CropMask", mask=["1", 0], x=64, y=64, width=8, height=8)
    with pytest.raises(NodeError) as caught:
        client.run({"1": mask, "2": nothing, "3": node("MaskToImage", mask=["2", 0]), "4": save("3")})
    assert (caught.value.node_id, caught.value.class_type) == ("3", "MaskToImage")
    assert caught.value.message


def test_an_interrupted_run_says_so_and_the_next_one_works(client):
    steps = {str(i): scale(str(i - 1), 2048 + i, "lanczos") for i in range(2, 60)}
    prompt = {"1": node("LoadImage", image=PHOTO.name), **steps, "60": save("59")}
    prompt_id = client.queue(prompt)
    with pytest.raises(Interrupted):
        client.wait(prompt_id, lambda progress: client.interrupt())
    assert client.run({"1": node("LoadImage", image=PHOTO.name), "2": save("1")})


def test_a_server_that_cannot_start_shows_its_log(tmp_path):
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-option"):
        with running_server(ensure_host(), ["--no-such-option"], tmp_path / "log.txt"):
            pass
