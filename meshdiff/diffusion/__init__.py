"""Sampling: requests, guidance, and the way from noise to data."""
