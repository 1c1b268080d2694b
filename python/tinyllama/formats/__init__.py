"""File formats: each module reads one into a neutral Checkpoint and writes one from it."""
