"""Runs, finished or not, become one page and one Markdown file that show them side by side."""
