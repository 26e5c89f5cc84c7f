"""Sampling: what a request asks for, guidance, and the way from noise to data."""
