"""Folders of runs, caches and models go in; a page in the browser comes out."""
