"""Layers that Megatron-core lacks, as plain PyTorch."""
