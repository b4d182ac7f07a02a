"""The part of the library that knows ComfyUI."""

KEY = "nested_attention"  # ours in the host's shared dictionaries
