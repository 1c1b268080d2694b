"""Judging a model: on text it has not seen, and by the stories it tells."""
