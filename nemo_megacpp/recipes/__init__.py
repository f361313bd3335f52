"""Recipes: named models with their layout and training settings; YAML in, NeMo out."""
