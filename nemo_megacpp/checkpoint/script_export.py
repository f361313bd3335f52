"""A run's checkpoint as one that Megatron's own script wrote, which the script resumes.

::

    OUT/
        latest_checkpointed_iteration.txt   the step, where the script looks for it
        iter_0000080/                       a checkpoint with the script's names and ``common.pt``
            nemo_megacpp.json               what it says of its model, layout and data
            manifest.json                   checksums, written last

The tensors' files are copied as they are. What differs is which name ``.metadata`` gives each
tensor, and what is not sharded: the step, the settings of the optimizer and of its schedule, and
the few arguments that the script compares with its own.
"""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nemo_megacpp.checkpoint.content import CheckpointContent, saved_shape
from nemo_megacpp.checkpoint.folder import new_folder
from nemo_megacpp.checkpoint.identity import Identity
from nemo_megacpp.checkpoint.lifecycle import finish_checkpoint
from nemo_megacpp.checkpoint.optimizer_state import FORM as OWN_FORM
from nemo_megacpp.checkpoint.optimizer_state import validate_optimizer_form
from nemo_megacpp.checkpoint.safe_pickle import CONFIG, EXTRA_STATE, METADATA
from nemo_megacpp.checkpoint.script_state import (
    FORM,
    common_optimizer,
    float32_among_masters,
    has_masters,
    script_optimizer,
)
from nemo_megacpp.checkpoint.weights import with_prefix
from nemo_megacpp.core.checkpoints import COMMON, TRACKER, iteration_folder
from nemo_megacpp.errors import UserError
from nemo_megacpp.layout import ParallelLayout

_VERSION = 3.0
"""That the script saves; it reorders attention's rows of an older one."""
_COMPARED = ("num_layers", "hidden_size", "num_attention_heads")
"""Arguments that the script refuses to change."""
_IN_ROWS = ("lr_warmup_steps", "lr_decay_steps")
"""Of a schedule: the script counts rows where a run counts steps."""
_IN_COMMON = ("max_lr", "min_lr", "lr_decay_style")


class Exported(NamedTuple):
    """What was written.

    Attributes:
        directory: the checkpoint, in the folder of the script's checkpoints.
        tensors: of the model.
        optimizer_tensors: moments and master weights.
    """

    directory: Path
    tensors: int
    optimizer_tensors: int


def export_megatron(source: Path, out: Path, *, weights_only: bool = False) -> Exported:
    """Write a checkpoint of a run into the new folder ``out``, as Megatron's script would have.

    With the optimizer's state go the step, the rows that were read and the place in the schedule.
    Random states are left out. From weights alone the script starts a new run
    (``--pretrained-checkpoint``), and refuses to resume them.

    Args:
        source: as :func:`nemo_megacpp.checkpoint.folder.find_checkpoint` takes it; its pickles were
            scanned.
        out: the folder that the script will be told to load.
        weights_only: leave out the optimizer. A checkpoint of ``import`` has none anyway.

    Raises:
        UserError: there is no checkpoint, the script wrote it, it does not say what the script
            needs, the script would load its optimizer's state wrongly, or ``out`` exists.
    """
    content = CheckpointContent(source)
    if content.identity is None:
        raise UserError(
            f"{content.directory} was not saved by a run of this package: it has no "
            f"nemo_megacpp.json, which says its model and layout."
        )
    moments = [] if weights_only else content.optimizer_tensors
    common = _common(content, content.identity, resumes=bool(moments))
    step = common["iteration"]
    with new_folder(out) as folder:
        written = iteration_folder(folder, step)
        written.mkdir()
        _write_tensors(content, moments, written)
        torch.save(common, written / COMMON)
        identity = {**content.identity, "step": step}
        finish_checkpoint(written, identity, step)
        (folder / TRACKER).write_text(str(step), encoding="utf-8")
    return Exported(iteration_folder(out, step), len(content.model_tensors), len(moments))


def _common(content: CheckpointContent, identity: Identity, *, resumes: bool) -> dict[str, Any]:
    """Return what is not sharded in a checkpoint of the script."""
    held, step = content.common(), content.step or 0
    layout = ParallelLayout.parse(identity.get("layout") or "tp=1")
    pattern = saved_shape(content.directory, identity).pattern
    args = Namespace(
        **{name: identity["model"].get(name) for name in _COMPARED},
        # Without it Megatron-Core 0.19 takes the checkpoint for one of a GPT.
        hybrid_layer_pattern=pattern.to_megatron("hybrid_layer_pattern", stand_ins=True),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        no_save_rng=True,
        no_save_optim=not resumes,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )
    common = {"args": args, "checkpoint_version": _VERSION, "content_metadata": FORM}
    if not resumes:
        # The script asks for a positive number, and starts at step 0 from weights.
        return {**common, "iteration": max(step, 1)}
    _validate_optimizer(content, held)
    args.consumed_train_samples = _rows(content, step)
    rows = args.consumed_train_samples // step
    groups = common_optimizer(held["optimizer"])
    return {
        **common,
        "iteration": step,
        "optimizer": script_optimizer(groups, masters=has_masters(content.optimizer_tensors)),
        "opt_param_scheduler": _schedule(held, step, rows),
    }


def _validate_optimizer(content: CheckpointContent, held: Mapping[str, Any]) -> None:
    form = held.get("content_metadata") or {}
    validate_optimizer_form(form)
    if OWN_FORM not in form:
        raise UserError(f"{content.directory} has the form of Megatron's script already.")
    if (wide := float32_among_masters(content.optimizer_tensors)) is not None:
        raise UserError(
            f"{content.directory} is of a bfloat16 model with float32 parameters, such as {wide}. "
            f"Megatron's script loads the optimizer's states of some parameters of such a model "
            f"into others. --weights-only exports what it can start from."
        )


def _rows(content: CheckpointContent, step: int) -> int:
    """Return the rows that a run has read, which the script's data and schedule count."""
    rows = content.consumed_samples
    if not step or rows is None:
        raise UserError(
            f"{content.directory} does not say how many steps and rows its run had done, so it "
            f"cannot be resumed."
        )
    if rows % step:
        raise UserError(
            f"{content.directory} has read {rows} rows in {step} steps: global_batch_size was "
            f"changed on the way. The script's learning rate depends on the rows and not on the "
            f"steps, and would leave the run's schedule."
        )
    return rows


def _schedule(held: Mapping[str, Any], step: int, rows: int) -> dict[str, Any]:
    """Return the state of the script's schedule, which counts rows: ``rows`` in every step.

    A run through Bridge saves none of its settings. The script then compares its own with None, and
    stops unless it is told to take its own.
    """
    (saved, *_) = held.get("lr_schedulers") or [{}]
    return {
        "num_steps": step * rows,
        **{name: saved.get(name) for name in _IN_COMMON},
        **{name: saved[name] * rows if name in saved else None for name in _IN_ROWS},
    }


def _write_tensors(content: CheckpointContent, moments: Iterable[str], out: Path) -> None:
    """Copy the files with the model's tensors and ``moments``, and name these in ``.metadata`` as
    the script does."""
    saved = content.metadata
    own = {content.prefix + name for name in content.model_tensors}
    extra = {name for name in saved.state_dict_metadata if EXTRA_STATE in name}
    names = {name: with_prefix(name, content.prefix, "") for name in own | extra | {*moments}}
    places = {place: info for place, info in saved.storage_data.items() if place.fqn in names}
    renamed = dataclasses.replace(
        saved,
        state_dict_metadata={
            names[name]: entry for name, entry in saved.state_dict_metadata.items() if name in names
        },
        storage_data={
            dataclasses.replace(place, fqn=names[place.fqn]): info for place, info in places.items()
        },
        planner_data={},
    )
    (out / METADATA).write_bytes(pickle.dumps(renamed))
    for file in sorted({CONFIG, *(info.relative_path for info in places.values())}):
        shutil.copyfile(content.weights / file, out / file)
