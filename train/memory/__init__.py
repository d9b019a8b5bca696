"""A configuration becomes bytes and advice before anything is loaded."""
