"""Stage one: images and captions become a cache of tensors."""
