"""Flags of other training tools become ours, or a refusal that says what to write instead."""
