"""What the tabs set to work: drawing, browsing and a command, with one model in memory."""
