"""Layouts timed side by side."""
