"""The nodes: their schemas and the wiring to `nested_attention`; no mathematics."""
