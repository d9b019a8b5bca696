"""The cache as stage one keeps it: what it knows already, what it no longer needs."""
