"""Models of random weights and a few MB, for tests and documentation."""
