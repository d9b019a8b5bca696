"""A frozen dataclass and a command line, or a file of settings, become a configuration."""
