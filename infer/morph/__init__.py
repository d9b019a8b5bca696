"""Two pictures go in; frames that lead from one to the other come out."""
