"""The pack's own sockets, and where its nodes stand in the menu."""

from __future__ import annotations

from comfy_api.latest import io

Adapter = io.Custom("NESTED_ADAPTER")
Subject = io.Custom("NESTED_SUBJECT")

CATEGORY = "conditioning/nested attention"
