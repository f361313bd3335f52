"""Where a run writes, and what it keeps there."""

from __future__ import annotations

# In a folder of their own: NeMo moves the files that it finds in a run folder out of the way.
RECORD = "record"
RECIPE_FILE = f"{RECORD}/recipe.yaml"
METRICS_FILE = f"{RECORD}/metrics.jsonl"
EVENTS_FILE = f"{RECORD}/events.jsonl"
