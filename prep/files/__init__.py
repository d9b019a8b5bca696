"""Bytes from wherever they lie: local files, tars' streams, servers with bad connections."""
