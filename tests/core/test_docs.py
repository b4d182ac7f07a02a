"""What the documentation says of the code: its quotes are real messages, its links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "studio" / "README.md", *(ROOT / "docs").glob("*.md")]


def text(node):
    """A message as it stands in the code, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages():
    """Every text in the code, with … for what is filled in, as the documentation quotes it."""
    for folder in ("nodes", "nested_attention"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield text(node)


def test_quoted_messages_are_real():
    known = [re.sub("…+", "…", text) for text in messages()]
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        first = line.split("|")[1] if line.startswith("|") else ""
        for quote in re.findall('"(.+?)"', first):
            assert any(quote.strip("… ") in text for text in known), quote


def test_every_message_is_explained():
    """Each error and warning with words of its own is quoted on the page, or in the help of its node."""
    pages = [ROOT / "docs" / "troubleshooting.md", *(ROOT / "web" / "docs").glob("*.md")]
    quotes = re.findall('"(.+?)"', "".join(page.read_text(encoding="utf-8") for page in pages))
    quotes = [quote.strip("… .") for quote in quotes]
    for folder in ("nodes", "nested_attention"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name.endswith("Error") or name in ("warn", "say", "report"):
                    message = re.sub("…+", "…", text(node.args[0]))
                    own = re.search(r"\w{3}", message)
                    assert not own or any(len(quote) > 6 and quote in message for quote in quotes), (path.name, message)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_pictures_of_the_help_are_there():
    """The front end looks for them from web/docs, whatever the language."""
    help = ROOT / "web" / "docs"
    named = {
        name for page in help.rglob("*.md") for name in re.findall(r"!\[[^]]+\]\((.+?)\)", page.read_text("utf-8"))
    }
    assert named == {f"images/{path.name}" for path in (help / "images").iterdir()}
