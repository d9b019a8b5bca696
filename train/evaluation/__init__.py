"""Teacher and student become a table: who draws what was asked for, and how well."""
