"""What a row of any source is before it is decoded, and the units of work that rows come in."""
