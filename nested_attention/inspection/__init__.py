"""Seeing inside: what a run attended to (`record`), the paper's four views of it (`views`), and pictures of them.

Knows nothing of ComfyUI. Only `drawing` and `figures` need Pillow.
"""
