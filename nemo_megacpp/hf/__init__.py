"""Hugging Face's form of a model: export with modelling code, native formats, and import.

The files in ``remote`` are copied into an export. They import torch and transformers alone, and
nothing of this package imports them.
"""
