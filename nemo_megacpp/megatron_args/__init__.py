"""The Megatron-LM front end: a recipe becomes the arguments of ``pretrain_mamba.py``."""
