"""Pixels become latents, and captions text-encoder states, in batches of a fixed shape."""
