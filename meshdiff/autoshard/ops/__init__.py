"""Torch functions on shards."""
