"""A student becomes files that stock diffusers, ComfyUI and sd-scripts load."""
