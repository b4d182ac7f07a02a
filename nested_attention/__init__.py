"""Nested Attention (Patashnik et al., SIGGRAPH 2025): the library behind the nodes.

The modules here need torch, einops and safetensors alone; what knows ComfyUI stands in `nested_attention.host`.
"""
