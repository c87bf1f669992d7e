"""Training code of the bundled demonstration model."""
