"""The cache format: what a cache's folder holds becomes typed records, and the other way round."""
