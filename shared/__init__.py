"""What both stages must agree on. Imports neither of them."""
