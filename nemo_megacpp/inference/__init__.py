"""Generation: sequences in slots, sampling, text; loads no training code and no NeMo."""
