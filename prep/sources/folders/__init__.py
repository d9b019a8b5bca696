"""Folders of pictures become rows."""
