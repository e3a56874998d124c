"""megamoe: pretrain Mixture-of-Experts language models on Megatron-core, laptop to cluster."""

__version__ = "0.1.0"
