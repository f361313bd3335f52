"""Hybrid A/M/E/F/R language models for Megatron-Core and NeMo.

Importing the package loads neither torch nor NeMo; the rooms do, when they are used.
"""

__version__ = "0.1.0"
