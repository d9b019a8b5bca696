"""A cache becomes an archive for shipping, and the same cache again."""
