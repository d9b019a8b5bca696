"""Units of work become outcomes: one after the other in this process, or by Ray's workers."""
