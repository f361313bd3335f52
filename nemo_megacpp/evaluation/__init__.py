"""The held-out loss of a checkpoint's weights, without NeMo and without training code."""
