"""Test files that need NeMo, with what of it: skipped, each with its reason, where there is none.

Of the folders that ``make test-core-new`` runs; :mod:`tests.conftest` reads the list, and
``tests/test_needs_nemo.py`` holds it to what the files import.
"""

from __future__ import annotations

NEEDS_NEMO = {
    "contract/test_work.py": "compares operations with NeMo's formulas",
    "proof/test_training_path.py": "holds the proof's steps to NeMo's trainer",
    "settings/test_doors.py": "sets what NeMo's objects and its command line take",
}
"""Path below ``tests`` -> why."""
