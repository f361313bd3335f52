"""The door to Megatron-Bridge: a recipe becomes its ``ConfigContainer``, and its ``pretrain``."""
