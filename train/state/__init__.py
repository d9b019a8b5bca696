"""What a run keeps on the disk becomes the run again: checkpoints, optimizer, its configuration."""
