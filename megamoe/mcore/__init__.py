"""Everything that knows Megatron-core. The rest of the project speaks of plans and steps."""
