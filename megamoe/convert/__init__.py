"""Checkpoints to and from Hugging Face folders, tensor by tensor, without building a model."""
