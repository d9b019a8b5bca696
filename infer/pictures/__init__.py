"""Pictures of the user's go in as pixels; what is drawn comes out as files and films."""
