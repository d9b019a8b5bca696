"""A row's metadata becomes a decision: is it wanted?"""
