"""The modules that Megatron-Core lacks, and the torch backend's building blocks."""
