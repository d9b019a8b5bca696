"""Files, here and behind URLs: one way to read, to write whole or not at all, and to try again."""
