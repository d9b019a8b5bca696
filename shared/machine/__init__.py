"""What this computer has: processors and devices, asked for here alone."""
