"""A cache becomes answers: is it whole, what is in it, what does it look like?"""
