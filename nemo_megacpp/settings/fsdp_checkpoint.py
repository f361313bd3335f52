"""What a Megatron script may save and load under Megatron's FSDP, as messages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.transformer import TransformerConfig
from torch.distributed import checkpoint as dcp

from nemo_megacpp.core.checkpoints import FSDP_ARGUMENTS, iteration_folder, newest_iteration
from nemo_megacpp.core.fsdp import problem_with_saving

_DEGREES = {
    "tensor_model_parallel_size": (
        "TP",
        "the input projections of M and R are saved as the tensor-parallel ranks' parts one after "
        "another, and another TP would load their rows in the wrong order",
    ),
    "expert_model_parallel_size": ("EP", "no case has loaded one at another EP"),
    "expert_tensor_parallel_size": ("ETP", "no case has loaded one at another ETP"),
}
"""Those that a checkpoint of FSDP keeps, and why."""
_ASKED = "--use-megatron-fsdp"
_SAVED = "optim_grads_params"
_UNTRIED = {
    "async_save": "no case saves a checkpoint of FSDP in the background",
    "no_save_optim": "no case has saved the weights alone",
    "non_persistent_ckpt_type": "no case has saved one of these",
    "no_load_optim": "no case has loaded the weights alone",
    "finetune": "no case starts from other weights",
}
"""Arguments that change what is saved or loaded, and why they are refused."""


def fsdp_checkpoint_violations(model: TransformerConfig, args: Any) -> Iterator[str]:
    """Yield why the checkpoints that a script is asked for are refused under FSDP.

    Args:
        model: the model's configuration.
        args: of the script, which trains with Megatron's FSDP.
    """
    stored = [name for name in ("save", "load") if getattr(args, name, None)]
    if getattr(args, "pretrained_checkpoint", None):
        yield f"{_ASKED} with --pretrained-checkpoint: no case starts FSDP from other weights."
    if not stored:
        return
    asked = f"{_ASKED} with {' and '.join(f'--{name}' for name in stored)}"
    if not model.bf16:
        yield (
            f"{asked} in float32: Megatron names the weights of a gated MLP as in a bf16 model, "
            f"and stops when it saves. Train in bf16, or without a checkpoint."
        )
    if (problem := problem_with_saving()) is not None:
        yield f"{asked}: {problem}. Install Transformer Engine, or train without a checkpoint."
    strategy = args.data_parallel_sharding_strategy
    if strategy != _SAVED:
        yield (
            f"{asked} and --data-parallel-sharding-strategy {strategy}: no case has saved a "
            f"checkpoint with it. Legal: {_SAVED}."
        )
    for name, why in _UNTRIED.items():
        if getattr(args, name, None):
            yield f"{asked} and --{name.replace('_', '-')}: {why}. Leave it out."
    if "load" in stored:
        if not getattr(args, "strict_fsdp_dtensor_load", True):
            yield (
                f"{asked} and --no-strict-fsdp-dtensor-load: weights that the checkpoint lacks "
                f"would stay random. Leave it out."
            )
        yield from _load_violations(args)


def _load_violations(args: Any) -> Iterator[str]:
    """Yield why the checkpoint that a script is told to load is refused."""
    folder = _folder_to_load(args)
    if folder is None:
        return
    saved = _saved_arguments(folder)
    if saved is None:
        yield (
            f"{_ASKED} with --load of {folder}, which is no checkpoint of Megatron's FSDP "
            f"(fsdp_dtensor): no case loads another. Load one that was saved with {_ASKED}."
        )
        return
    for name, (short, why) in _DEGREES.items():
        then, now = getattr(saved, name, None), getattr(args, name, None)
        if then is not None and now is not None and then != now:
            yield (
                f"{_ASKED} with --load of {folder}, which was saved with {short}={then}, at "
                f"{short}={now}: {why}. Legal: {short}={then}; the number of data-parallel ranks "
                f"may change."
            )


def _folder_to_load(args: Any) -> Path | None:
    """Return the checkpoint that Megatron will load; None where it finds none, and says so."""
    folder, step = Path(args.load), getattr(args, "ckpt_step", None)
    found = iteration_folder(folder, step) if step else newest_iteration(folder)
    return found if found is not None and found.is_dir() else None


def _saved_arguments(folder: Path) -> Any:
    """Return the arguments of the script that saved a checkpoint, None where it is not one of FSDP.
    Megatron unpickles the same files next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not (folder / ".metadata").is_file():
            return None
        if FSDP_ARGUMENTS not in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata:
            return None
        state: dict[str, Any] = {FSDP_ARGUMENTS: None}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state[FSDP_ARGUMENTS]
