"""``nemo-megacpp doctor``: what is here, what is missing, and what that costs."""
