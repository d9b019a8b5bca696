"""Losses: each a callable on tensors and networks, and nothing else."""
