"""A finished cache and its teacher become answers: what the teacher says of every sample."""
