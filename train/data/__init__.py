"""A cache and a position become a batch of tensors, the same at every run."""
