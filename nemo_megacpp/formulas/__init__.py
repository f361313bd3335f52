"""What a family's formulas are written in: a job's sizes, collectives, saved activations."""
