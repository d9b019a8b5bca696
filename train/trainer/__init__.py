"""A configuration becomes a run: set up, looped, recorded, stopped and resumed."""
