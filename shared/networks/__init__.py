"""A model becomes a network that is called: its outputs, and latents drawn with it."""
