"""Commands for developing and trying the pack; nothing here is needed inside ComfyUI."""
