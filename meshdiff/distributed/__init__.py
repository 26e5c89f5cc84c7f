"""Ranks: meshes, collectives, shards of tensors, and their simulation; nothing here knows attention or a model."""
