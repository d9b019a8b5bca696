"""WebDataset tars become rows."""
