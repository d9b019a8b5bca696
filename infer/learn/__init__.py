"""A picture and words that say what it shows go in; a run whose LoRA draws it comes out."""
