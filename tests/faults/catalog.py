"""All kinds of faults."""

from tests.faults import damage, hostile, saves

KINDS = (*damage.KINDS, *hostile.KINDS, *saves.KINDS)
