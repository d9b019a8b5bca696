"""Units of rows and a set of encoders become shards, accounts and commit records."""
