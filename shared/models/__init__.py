"""A model's name, folder or single file becomes a configuration and whole, checked weights."""
