"""A picture's bytes become upright sRGB pixels, and those the crops that are encoded."""
