"""Writes locales/en from the nodes' schemas. After it, translate in locales/zh what a test then misses there."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script, not imported
    sys.path[0] = str(ROOT)

from scripts.environment import ensure_host, enter, take_no_options  # noqa: E402

LOCALES = ROOT / "locales"


def node_texts(schemas: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """nodeDefs.json: every text of the nodes that the front end shows, by node id."""
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {str(i): text for i, output in enumerate(schema.outputs) if (text := output_text(output))},
        }
        for schema in schemas
    }


def output_text(output: Any) -> dict[str, str]:
    """Name and tooltip, where an output has its own; the front end translates names of types itself."""
    name = output.display_name if output.display_name != output.io_type else None
    return {key: text for key, text in (("name", name), ("tooltip", output.tooltip)) if text}


def main_texts(schemas: Iterable[Any]) -> dict[str, Any]:
    """main.json: the nodes' own menu, below one of the host's."""
    return {"nodeCategories": {schema.category.split("/")[-1]: schema.category.split("/")[-1] for schema in schemas}}


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


async def schemas_of_pack() -> list[Any]:
    spec = importlib.util.spec_from_file_location("nested_attention_pack", ROOT / "__init__.py")
    pack = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    return [node.define_schema() for node in await extension.get_node_list()]


def main() -> None:
    take_no_options(__doc__)
    host = ensure_host()
    enter(host)
    sys.path.insert(1, str(host.comfyui))
    from comfy.cli_args import args

    args.cpu = True
    schemas = asyncio.run(schemas_of_pack())
    for name, texts in (("main.json", main_texts(schemas)), ("nodeDefs.json", node_texts(schemas))):
        content = json.dumps(texts, indent=2, ensure_ascii=False) + "\n"
        (LOCALES / "en" / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
