"""Faults, injected for real: ``python -m tests.faults --hours 1 --seed 1`` does so at length."""
