"""M: a Mamba mixer, Megatron's own (mode ``nemo_native``) or ours (mode ``mamba3``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nemo_megacpp.families import BlockFamily, register
from nemo_megacpp.formulas.collectives import Collective
from nemo_megacpp.formulas.saved import Saved
from nemo_megacpp.layout.rules import Divides, GroupsDivideHeads, LayoutCheck, LayoutViolation
from nemo_megacpp.specs import mamba2, mamba3

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemo_megacpp.formulas.sizes import Sizes


def mamba_layer_spec(backend: BackendSpecProvider, settings: Mapping[str, Any]) -> ModuleSpec:
    """Return the layer of the mode that ``settings`` name."""
    if settings["mode"] == "mamba3":
        return mamba3.mamba3_layer_spec(backend, settings)
    return mamba2.mamba2_layer_spec(backend)


def _context_parallel(check: LayoutCheck) -> Iterator[LayoutViolation]:
    # Under CP an M block turns from sequence shards to head shards, on top of TP's split. Source:
    # megatron/core/ssm/mamba_context_parallel.py.
    tp, cp = check.layout.tp, check.layout.cp
    heads, groups = check.shape.mamba_num_heads, check.shape.mamba_num_groups
    if cp == 1:
        return
    if heads and heads % (tp * cp):
        yield LayoutViolation(
            "CP",
            "mamba-heads-cp",
            f"mamba_num_heads = {heads} is not divisible by TP x CP = {tp} x {cp} = {tp * cp}: "
            f"under CP an M block shards its heads over TP and CP.",
            knobs=("cp", "tp"),
        )
    if groups and groups % tp == 0:
        local = groups // tp
        if local % cp and cp % local:
            yield LayoutViolation(
                "CP",
                "mamba-groups-cp",
                f"mamba_num_groups = {groups} at TP = {tp} leaves {local} groups a rank, which "
                f"CP = {cp} neither divides nor is divisible by.",
                knobs=("cp", "tp"),
            )


def _is_mamba3(sizes: Sizes) -> bool:
    return sizes.config.mode == "mamba3"


def _collectives(sizes: Sizes) -> list[Collective]:
    return (mamba3.mamba3_collectives if _is_mamba3(sizes) else mamba2.mamba2_collectives)(sizes)


def _saved_activations(sizes: Sizes) -> list[Saved]:
    return (mamba3.mamba3_saved if _is_mamba3(sizes) else mamba2.mamba2_saved)(sizes)


def _mixing(sizes: Sizes) -> int:
    return (mamba3.mamba3_mixing if _is_mamba3(sizes) else mamba2.mamba2_mixing)(sizes)


register(
    BlockFamily(
        letter="M",
        name="Mamba",
        layer_spec=mamba_layer_spec,
        rules=(
            Divides(
                "mamba-heads", "mamba_num_heads", "tp", "each rank of an M block holds whole heads"
            ),
            Divides(
                "mamba-groups",
                "mamba_num_groups",
                "tp",
                "each rank of an M block holds whole B/C groups, with their heads",
            ),
            GroupsDivideHeads("mamba-heads-per-group", "mamba_num_heads", "mamba_num_groups"),
            _context_parallel,
        ),
        required=("mamba_num_heads", "mamba_num_groups"),
        collectives=_collectives,
        saved_activations=_saved_activations,
        mixing=_mixing,
    )
)
