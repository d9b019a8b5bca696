"""Prompts and a pipeline become pictures."""
