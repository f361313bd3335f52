"""The NeMo front end: a recipe becomes NeMo's model, data, trainer and optimizer."""
