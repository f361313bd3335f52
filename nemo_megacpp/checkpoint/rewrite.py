"""Save a checkpoint again, on ranks started for that: in another layout, or from safetensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_megacpp.checkpoint.content import CheckpointContent
from nemo_megacpp.checkpoint.export import read_config, read_export
from nemo_megacpp.checkpoint.folder import WEIGHTS, find_checkpoint, new_folder
from nemo_megacpp.checkpoint.guard import inspect_before_load
from nemo_megacpp.checkpoint.identity import Identity, read_identity, write_identity
from nemo_megacpp.checkpoint.inspect import saved_shape
from nemo_megacpp.checkpoint.manifest import check_manifest, write_manifest
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout, validate_layout
from nemo_megacpp.layout.parallel import read_degrees

StartRanks = Callable[[int], AbstractContextManager[Any]]
"""Starts that many ranks, as :class:`nemo_megacpp.runtime.workers.WorkerPool` does."""


def target_layout(source: Path, degrees: str) -> ParallelLayout:
    """Return the layout in which a checkpoint was saved, with other degrees in it.

    Its world is the smallest that holds the layout, unless ``degrees`` give one. A checkpoint that
    does not say its layout counts as saved by a single rank.

    Args:
        source: as :func:`nemo_megacpp.checkpoint.folder.find_checkpoint` takes it.
        degrees: ``tp=2,pp=2``; see :meth:`nemo_megacpp.layout.ParallelLayout.changed`.

    Raises:
        UserError: there is no checkpoint, or the degrees cannot be read.
    """
    changes = read_degrees(degrees)
    identity = read_identity(find_checkpoint(source))
    saved = ParallelLayout.parse((identity and identity.get("layout")) or "tp=1")
    return replace(saved, world_size=None).changed(changes)


def reshard(
    source: Path, out: Path, layout: ParallelLayout, start: StartRanks, *, verify: bool = True
) -> tuple[int, int]:
    """Save a checkpoint again as a job in ``layout`` would have saved it.

    Weights and optimizer states keep every bit;
    :func:`nemo_megacpp.checkpoint.rewrite_rank.rewrite` says what is split and what stays whole.

    Args:
        source: a checkpoint with an identity.
        out: a new folder.
        layout: whose ranks save it.
        start: starts that many ranks on this machine.
        verify: compare the source with its manifest first.

    Returns:
        How many tensors were split as the layout splits them, and how many were saved whole.

    Raises:
        UserError: a checkpoint that is damaged, unsafe or does not say its model, a layout that is
            illegal for it, or an ``out`` that exists.
    """
    # It imports Megatron, and a rank must do that before the no-GPU host is put in place.
    from nemo_megacpp.checkpoint.rewrite_rank import rewrite_on_rank

    content = CheckpointContent(source)
    if content.identity is None:
        raise UserError(
            f"{content.directory} does not say which model it holds (it has no nemo_megacpp.json), "
            f"so it is not known how {layout.short()} splits its tensors. A checkpoint of any "
            f"layout loads into any other without resharding."
        )
    validate_layout(layout, saved_shape(content.directory, content.identity))
    inspect_before_load(content.directory, verify=verify)
    with new_folder(out) as folder:
        weights = folder / content.weights.relative_to(content.directory)
        weights.mkdir(exist_ok=True)
        with start(layout.world) as ranks:
            counts = ranks.run(
                layout.world,
                rewrite_on_rank,
                content.weights,
                weights,
                content.identity["model"],
                layout,
            )
        _finish(folder, {**content.identity, "layout": layout.short()})
    return counts[0]


def import_safetensors(source: Path, out: Path, start: StartRanks, *, verify: bool = True) -> int:
    """Make a checkpoint of a folder that ``export`` wrote.

    It has the weights under the names they had, and no optimizer.

    Returns:
        Number of tensors.

    Raises:
        UserError: a folder that is damaged or something else, or an ``out`` that exists.
    """
    from nemo_megacpp.checkpoint.rewrite_rank import import_on_rank

    config = read_config(source)
    if verify:
        check_manifest(source)
    names = len(read_export(source))
    with new_folder(out) as folder:
        weights = folder / WEIGHTS
        weights.mkdir()
        with start(1) as ranks:
            ranks.run(1, import_on_rank, source, weights, config["prefix"])
        _finish(folder, config["identity"])
    return names


def _finish(folder: Path, identity: Identity | None) -> None:
    if identity is not None:
        write_identity(folder, identity, identity["step"])
    write_manifest(folder)
