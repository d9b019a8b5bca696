"""What a trained student is good for: a thin layer over stock diffusers pipelines."""
