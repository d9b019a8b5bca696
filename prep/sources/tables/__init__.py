"""Parquet files and Hugging Face datasets become rows."""
