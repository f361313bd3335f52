"""What a model keeps of one sequence while it generates."""

from __future__ import annotations

from nemo_megacpp.families import block_of
from nemo_megacpp.formulas.inference import KeptState, constant, per_token
from nemo_megacpp.formulas.sizes import Sizes
from nemo_megacpp.pattern import Family
from nemo_megacpp.render import show_bytes


def sequence_state(sizes: Sizes) -> dict[str, list[KeptState]] | None:
    """Return what one layer of each family keeps on a rank, by letter; None where a family has no
    inference.

    The states are split over tp, and with the layers over pp; no other axis splits them.
    """
    declared = {letter: block_of(Family(letter)).inference_state for letter in sizes.letters}
    kept = {letter: declare(sizes) for letter, declare in declared.items() if declare is not None}
    return kept if len(kept) == len(declared) else None


def state_line(sizes: Sizes) -> str | None:
    """Return the bytes of a sequence in all layers of a tensor-parallel rank, of all its pipeline
    stages together, as one sentence."""
    kept = sequence_state(sizes)
    if kept is None:
        return None
    once = {each: sizes.letters.count(each) * constant(items) for each, items in kept.items()}
    growing = {each: sizes.letters.count(each) * per_token(items) for each, items in kept.items()}

    def of(each: dict[str, int]) -> str:
        letters = ", ".join(letter for letter, size in each.items() if size)
        return f"{show_bytes(sum(each.values()))} ({letters})" if letters else "nothing"

    length = sizes.config.seq_length
    whole = sum(once.values()) + length * sum(growing.values())
    tp, pp = sizes.layout.tp, sizes.layout.pp
    who, own = f"Generating at TP={tp}, a rank keeps", ""
    if pp > 1:
        who = f"Generating at TP={tp} and PP={pp}, the ranks of a pipeline together keep"
        own = "; a stage keeps the part of its own layers"
    return (
        f"{who} of a sequence {of(once)}, and of each of its tokens {of(growing)}: "
        f"{show_bytes(whole)} at {length:,} tokens{own}."
    )
