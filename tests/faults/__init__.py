"""Faults, injected for real. ``python -m tests.faults --kills 100 --seed 1`` kills at length."""
