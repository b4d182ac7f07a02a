"""Training of adapters: `python -m nested_attention.training --config FILE`.

The modules here know no ComfyUI; `nested_attention.host` brings the base model to them.
"""
