"""A configuration becomes bytes, operations and advice before anything is loaded."""
