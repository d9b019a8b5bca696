"""What the browser shows: a tab each, and what comes from it."""
