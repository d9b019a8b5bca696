"""Pictures become figures: features, distances between sets of them, scores, and intervals."""
