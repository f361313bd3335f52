"""All kinds of faults."""

from tests.faults import damage, documents, hostile, inputs, runs, saves, strikes

KINDS = (
    *damage.KINDS,
    *documents.KINDS,
    *hostile.KINDS,
    *inputs.KINDS,
    *strikes.KINDS,
    *saves.KINDS,
    *runs.KINDS,
)
