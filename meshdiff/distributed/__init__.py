"""Ranks: meshes, collectives, shards of tensors, and their simulation; nothing here uses attention or a model."""
