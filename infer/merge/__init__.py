"""LoRAs become one LoRA, or part of a model."""
