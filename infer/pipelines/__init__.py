"""A run, a model, LoRAs and a ControlNet go in; a stock diffusers pipeline comes out."""
