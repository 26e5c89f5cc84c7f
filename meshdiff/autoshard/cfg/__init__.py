"""The guidance branches of a pipeline, at once."""
