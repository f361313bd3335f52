"""Megatron distributed checkpointing (DCP): save, load, reshard, verify."""
