"""The Megatron-LM front end: a recipe becomes the arguments of Megatron's own script."""
