"""A teacher's weights become the networks that a step calls: teacher, student, target."""
