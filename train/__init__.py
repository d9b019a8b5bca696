"""Stage two: a cache of tensors becomes a student."""
