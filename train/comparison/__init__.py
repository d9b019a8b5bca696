"""Runs and their evaluations become one table and one picture: what each took, what came of it."""
