"""Where a run writes."""

from __future__ import annotations

# In a folder of its own: NeMo moves the files that it finds in a run folder out of the way.
RECORD = "record"
RECIPE_FILE = f"{RECORD}/recipe.yaml"
METRICS_FILE = f"{RECORD}/metrics.jsonl"
EVENTS_FILE = f"{RECORD}/events.jsonl"
SUMMARY_FILE = f"{RECORD}/summary.json"
LOCK_FILE = f"{RECORD}/lock"
OWNER_FILE = f"{RECORD}/owner.json"
INITIAL_WEIGHTS = f"{RECORD}/initial_weights"
PROFILE_FOLDER = "profile"
