"""Checkpoints as files: where they lie, what they are made of, whether they are sound. No torch."""
