"""Captions without pictures become samples of a cache: a teacher draws the latents."""
