"""Save a checkpoint again, on ranks started for that: in another layout, or from safetensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from nemo_megacpp.checkpoint.content import CheckpointContent, saved_shape
from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict, require_psutil
from nemo_megacpp.checkpoint.export import read_config, read_export
from nemo_megacpp.checkpoint.folder import WEIGHTS, find_checkpoint, new_folder
from nemo_megacpp.checkpoint.guard import inspect_before_load
from nemo_megacpp.checkpoint.identity import FILE as IDENTITY
from nemo_megacpp.checkpoint.identity import Identity, read_identity, write_identity
from nemo_megacpp.checkpoint.manifest import FILE as MANIFEST
from nemo_megacpp.checkpoint.manifest import check_manifest, write_manifest
from nemo_megacpp.checkpoint.save_errors import save_errors
from nemo_megacpp.config import HybridConfig, config_fields
from nemo_megacpp.core.checkpoints import COMMON_OBJECT, keep_common_file
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout, validate_layout
from nemo_megacpp.layout.parallel import read_degrees
from nemo_megacpp.printable import cut
from nemo_megacpp.runtime.distributed import start_model_parallel
from nemo_megacpp.runtime.workers import WorkerError
from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks

_CONTENT_METADATA = "content_metadata"
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
    source: Path,
    out: Path,
    layout: ParallelLayout,
    start: StartRanks,
    *,
    verify: bool = True,
    say: Callable[[str], object] = str,
) -> tuple[int, int]:
    """Save a checkpoint again as a job in ``layout`` would have saved it.

    Weights and optimizer states keep every bit; :func:`rewrite` says what is split.

    Args:
        source: a checkpoint with an identity.
        out: a new folder.
        layout: whose ranks save it.
        start: starts that many ranks on this machine.
        verify: compare the source with its manifest first.
        say: is called with what was verified, before anything is written.

    Returns:
        How many tensors were split as the layout splits them, and how many were saved whole.

    Raises:
        UserError: a checkpoint that is damaged, unsafe or does not say its model, a layout that is
            illegal for it, or an ``out`` that exists.
    """
    content = CheckpointContent(source)
    if content.identity is None:
        raise UserError(
            f"{content.directory} does not say which model it holds (it has no nemo_megacpp.json), "
            f"so it is not known how {layout.short()} splits its tensors. A checkpoint of any "
            f"layout loads into any other without resharding."
        )
    if modules := content.identity["model"].get("family_modules"):
        raise UserError(
            f"{content.directory} names family_modules={modules}, and reshard imports no code that "
            f"a checkpoint names. A checkpoint of any layout loads into any other without it."
        )
    validate_layout(layout, saved_shape(content.directory, content.identity))
    validate_buildable(content.directory, content.identity["model"], layout)
    say(f"{content.directory}: {inspect_before_load(content.directory, verify=verify)}")
    with new_folder(out) as folder:
        weights = folder / content.weights.relative_to(content.directory)
        weights.mkdir(exist_ok=True)
        arguments = (content.weights, weights, content.identity["model"], layout)
        with start(layout.world) as ranks, refusals(weights, out):
            counts = ranks.run(layout.world, rewrite_on_rank, *arguments)
        finish(folder, {**content.identity, "layout": layout.short()})
    return counts[0]


def validate_buildable(directory: Path, model: dict[str, Any], layout: ParallelLayout) -> None:
    """Refuse a model that no rank could build, with whatever Megatron says of its settings."""
    try:
        HybridConfig(**config_fields(model, layout, torch.float32, "cpu"))
    except UserError:
        raise
    except Exception as error:
        reason = cut(str(error).splitlines()[0] if str(error) else type(error).__name__, 200)
        raise UserError(f"{directory / IDENTITY} is damaged: model: {reason}.") from None


def import_safetensors(
    source: Path,
    out: Path,
    start: StartRanks,
    *,
    verify: bool = True,
    say: Callable[[str], object] = str,
) -> int:
    """Make a checkpoint of a folder that ``export`` wrote.

    It has the weights under the names they had, and no optimizer. For ``verify`` and ``say`` see
    :func:`reshard`.

    Returns:
        Number of tensors.

    Raises:
        UserError: a folder that is damaged or something else, or an ``out`` that exists.
    """
    config = read_config(source)
    if verify:
        if not (source / MANIFEST).exists():
            raise UserError(
                f"{source} has no manifest ({MANIFEST}), which export writes last: it was removed, "
                f"or the export did not end. --no-verify imports it unverified."
            )
        say(f"{source}: {check_manifest(source)}")
    names = len(read_export(source))
    with new_folder(out) as folder:
        weights = folder / WEIGHTS
        weights.mkdir()
        with start(1) as ranks, refusals(weights, out):
            ranks.run(1, import_on_rank, source, weights, config["prefix"])
        finish(folder, config["identity"])
    return names


@contextlib.contextmanager
def refusals(written: Path, out: Path) -> Iterator[None]:
    """Raise what a rank refused as a UserError of this process, which names ``out``."""
    try:
        yield
    except WorkerError as error:
        if error.refusal is None:
            raise
        raise UserError(error.refusal.replace(str(written), str(out))) from None


def finish(folder: Path, identity: Identity | None) -> None:
    """Write the identity, if there is one, and the manifest of a checkpoint."""
    if identity is not None:
        write_identity(folder, {**identity, "manifest": MANIFEST}, identity["step"])
    write_manifest(folder)


# --- on the ranks


def rewrite_on_rank(
    source: Path, out: Path, model: dict[str, Any], layout: ParallelLayout
) -> tuple[int, int]:
    """Take a place in ``layout`` and :func:`rewrite`; ``model`` is the identity's."""
    start_model_parallel(layout)
    fields = config_fields(model, layout, torch.float32, "cpu")
    config = HybridConfig(**fields, perform_initialization=False)
    return rewrite(source, out, build_hybrid_chunks(config))


def import_on_rank(source: Path, out: Path, prefix: str) -> None:
    """Save the tensors of an exported folder, whole, under their names with ``prefix``."""
    tensors = {prefix + name: tensor for name, tensor in read_export(source).items()}
    save_whole(tensors, out, f"{source} is unchanged.")


def save_whole(tensors: Mapping[str, torch.Tensor], out: Path, kept: str) -> None:
    """Save tensors, each whole, from one rank.

    Args:
        tensors: by their names in the checkpoint.
        out: folder of the weights.
        kept: what an error message says of the source.
    """
    require_psutil()
    sharded = {
        name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()
    }
    with save_errors(out, kept):
        dist_checkpointing.save(sharded, str(out))
        if torch.distributed.get_rank() == 0:
            keep_common_file(out)


def rewrite(source: Path, out: Path, chunks: list[torch.nn.Module]) -> tuple[int, int]:
    """Load everything of a checkpoint, split as ``chunks`` are split on these ranks, and save it.

    An optimizer tensor whose name ends with a parameter's, and that has its shape, is split as the
    parameter is. Rank 0 saves whole what belongs to no parameter or has another shape (padding of
    the vocabulary that depends on TP, buckets of a distributed optimizer), and the pickled objects.
    No value is computed: what is saved is what was loaded.

    Args:
        source: folder of the weights.
        out: a new folder, seen by all ranks.
        chunks: the model, built in the target layout; its weights are not read.

    Returns:
        How many tensors were split like a parameter, and how many were saved whole.
    """
    require_psutil()
    first = torch.distributed.get_rank() == 0
    content = CheckpointContent(source)
    own = _shards_by_key(chunks)
    everywhere: list[dict[str, tuple[int, ...]]] = [{}] * torch.distributed.get_world_size()
    shapes = {key: tuple(shards[0].global_shape) for key, shards in own.items()}
    torch.distributed.all_gather_object(everywhere, shapes)
    known = {key: shape for found in everywhere for key, shape in found.items()}
    wanted: dict[str, Any] = {}
    split = 0
    for name, info in content.tensors.items():
        dtype = getattr(torch, info.dtype)
        parameter = _parameter_of(name, info.shape, known)
        split += parameter is not None
        if parameter is not None:
            for number, shard in enumerate(own.get(parameter, ())):
                data = torch.empty(shard.local_shape, dtype=dtype)
                wanted[f"{name}#{number}"] = replace(shard, key=name, data=data, dtype=dtype)
        elif first:
            data = torch.empty(info.shape, dtype=dtype)
            wanted[f"{name}#0"] = ShardedTensor.from_rank_offsets(name, data)
    if first:
        objects = content.metadata.state_dict_metadata.keys() - content.tensors.keys()
        objects -= {COMMON_OBJECT}
        wanted |= {name: ShardedObject.empty_from_unique_key(name) for name in objects}
    loaded = dist_checkpointing.load(wanted.copy(), str(source))
    common = {key: value for key, value in loaded.items() if key not in wanted}
    saved = {key: replace(wanted[key], data=loaded[key]) for key in wanted}
    metadata = common.pop(_CONTENT_METADATA, None)
    with save_errors(out, f"{source} is unchanged."):
        dist_checkpointing.save({**common, **saved}, str(out), content_metadata=metadata)
        if first:
            keep_common_file(out)
    return split, len(content.tensors) - split


def _shards_by_key(chunks: list[torch.nn.Module]) -> dict[str, list[ShardedTensor]]:
    found: dict[str, list[ShardedTensor]] = {}
    for value in nested_values(model_sharded_state_dict(chunks)):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            if isinstance(part, ShardedTensor):
                found.setdefault(part.key, []).append(part)
    return found


def _parameter_of(
    name: str, shape: tuple[int, ...], known: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Return the parameter whose name ends ``name``, if it has this shape."""
    while name:
        if name in known:
            return name if known[name] == shape else None
        name = name.partition(".")[2]
    return None
