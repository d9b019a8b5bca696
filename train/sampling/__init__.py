"""Networks and embeddings become pictures, through diffusers' own schedulers."""
