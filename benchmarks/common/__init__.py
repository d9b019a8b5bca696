"""What several benchmarks use: random models of real size, caches, steps, the machine."""
