"""What `--shards` names becomes units of rows: a picture's bytes, its captions and its metadata."""
