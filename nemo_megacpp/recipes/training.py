"""The settings of a run, declared: type, range, default and meaning of each. Loads no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from nemo_megacpp.errors import UserError, collect_violations, raise_violations
from nemo_megacpp.values import read_value

_Count = Annotated[int, Field(ge=1)]
_NotNegative = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Minutes = Annotated[float, Field(ge=0.01, le=10_000)]
_Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(
    frozen=True,
    config=ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True),
)
class Training:
    """Settings of a run, apart from model and layout.

    Raises:
        pydantic.ValidationError: a value is of the wrong type or out of range, or two settings
            contradict each other. :func:`read_training` names all of them for the user.
    """

    # batch
    micro_batch_size: _Count = 1
    """Rows of ``seq_length`` tokens in a forward pass."""
    global_batch_size: _Count = 8
    """Rows in an optimizer step."""
    packed_documents: bool = False
    """Attention, M and R, and positions, start anew at each document of a row, and the end of a
    document predicts nothing; else they run across. Megatron's ``reset_attention_mask``,
    ``reset_position_ids`` and ``eod_mask_loss``, and the states."""

    # steps
    max_steps: _Count = 1000
    """Optimizer steps of the whole run; also the length of the learning-rate schedule."""
    stop_after: _Count | None = None
    """Save and stop after this step; a resumed run does the rest."""
    # NumPy takes 32 bits, and NeMo adds a hundred for each pipeline stage.
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1234
    """Seed of weights and data order."""

    # optimizer
    lr: _Positive = 3e-4
    """Peak learning rate."""
    min_lr: _NotNegative = 3e-5
    """Final learning rate; ``lr_decay_style=constant`` does not use it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up."""
    lr_warmup_init: _NotNegative | None = None
    """Learning rate of the first step of a warm-up; null: lr / (warmup_steps + 1)."""
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = "cosine"
    """Megatron's learning-rate schedule after the warm-up."""
    lr_wsd_decay_steps: _Count | None = None
    """With ``lr_decay_style=WSD``: the last steps of the run, in which the learning rate decays."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """With ``lr_decay_style=WSD``: how it decays."""
    weight_decay: _NotNegative = 0.1
    """AdamW weight decay."""
    adam_beta1: _Beta = 0.9
    """AdamW beta1."""
    adam_beta2: _Beta = 0.95
    """AdamW beta2."""
    adam_eps: _Positive = 1e-8
    """AdamW epsilon."""
    clip_grad: _NotNegative = 1.0
    """Upper bound on the gradient norm; 0: no bound."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = True
    """Reduce gradients over data-parallel ranks while the backward pass computes others."""
    overlap_param_gather: bool | None = None
    """Gather parameters over data-parallel ranks while the forward pass computes; null: with
    ``use_distributed_optimizer`` and ``overlap_grad_reduce``, without which it is illegal."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of parameters and activations."""

    # evaluation and logging
    val_check_interval: _Count = 100
    """Steps between evaluations on held-out data."""
    limit_val_batches: _Count = 8
    """Global batches per evaluation."""
    log_interval: _Count = 10
    """Steps between progress lines."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; null: none."""
    wandb_name: str | None = None
    """Name of the run in Weights & Biases; null: that of the run folder."""

    # profiler
    use_pytorch_profiler: bool = False
    """Write a ``torch.profiler`` trace of the chosen steps into the run folder."""
    profile_step_start: Annotated[int, Field(ge=0)] = 10
    """Steps that are complete when the trace begins."""
    profile_step_end: _Count = 12
    """Steps that are complete when the trace ends."""
    profile_ranks: list[int] = Field(default_factory=lambda: [0])
    """Global ranks that write a trace."""

    # checkpoints
    save_interval: _Count = 500
    """Steps between checkpoints."""
    async_save: bool = False
    """Write checkpoints in the background while training continues."""
    keep_latest: _Count | None = None
    """Number of newest checkpoints to keep; null: all."""
    keep_every: _Count | None = None
    """With ``keep_latest``: also keep the checkpoints of multiples of this step."""
    verify_checkpoint: bool = True
    """Compare every byte of a checkpoint with its manifest before loading it."""
    damaged_checkpoint: Literal["skip", "stop"] = "skip"
    """Where the newest checkpoint of a run to resume is damaged: skip it, resume the newest
    undamaged one and log the steps that are lost, or stop."""
    init_side_channels: Literal["same", "any"] = "same"
    """With ``init_from``: refuse a checkpoint of other side channels (same), or drop those that
    only it has and initialize those that only the model has (any)."""

    # stalled ranks
    heartbeat_timeout_minutes: _Minutes | None = 5.0
    """End the run when a rank makes no progress, or does not respond, for this long; null: never,
    and the timeout of torch's process groups ends it."""
    init_timeout_minutes: _Minutes = 20.0
    """The same from the start through the first step and the first batch of an evaluation, and
    while a checkpoint is saved."""

    @property
    def first_lr(self) -> float:
        """Learning rate of the first step of a warm-up: above 0 by default, as in NeMo."""
        default = self.lr / (self.warmup_steps + 1)
        return default if self.lr_warmup_init is None else self.lr_warmup_init

    @property
    def gathers_in_forward(self) -> bool:
        """``overlap_param_gather``, or its default."""
        default = self.use_distributed_optimizer and self.overlap_grad_reduce
        return default if self.overlap_param_gather is None else self.overlap_param_gather

    @model_validator(mode="after")
    def _validate_relations(self) -> Training:
        raise_violations(self._violations())
        return self

    def _violations(self) -> Iterator[str]:
        """Yield what contradicts another setting; a message names every setting it depends on."""
        if self.packed_documents and self.micro_batch_size != 1:
            yield (
                f"packed_documents: a microbatch of packed documents is one row, and "
                f"micro_batch_size={self.micro_batch_size}. Leave micro_batch_size out, or set it "
                f"to 1; global_batch_size may stay."
            )
        if self.stop_after is not None and self.stop_after > self.max_steps:
            yield (
                f"stop_after: {self.stop_after} is past the end of the run, max_steps="
                f"{self.max_steps}."
            )
        if self.min_lr > self.lr:
            yield f"min_lr: {self.min_lr} is above lr={self.lr}, the peak. Give both."
        if self.warmup_steps >= self.max_steps:
            yield (
                f"warmup_steps: {self.warmup_steps} is not below max_steps={self.max_steps}: the "
                f"learning rate would rise to the end of the run and never decay. Give a smaller "
                f"warmup_steps."
            )
        if self.lr_warmup_init is not None and self.lr_warmup_init > self.lr:
            yield f"lr_warmup_init: {self.lr_warmup_init} is above lr={self.lr}, the peak."
        decay = self.lr_wsd_decay_steps
        if (self.lr_decay_style == "WSD") != (decay is not None):
            yield (
                f"lr_wsd_decay_steps={'null' if decay is None else decay} with lr_decay_style="
                f"{self.lr_decay_style}: lr_decay_style=WSD needs lr_wsd_decay_steps, and no other "
                f"style has it."
            )
        elif decay is not None and decay > self.max_steps - self.warmup_steps:
            yield (
                f"lr_wsd_decay_steps: {decay} is more than the steps after the warm-up, max_steps="
                f"{self.max_steps} - warmup_steps={self.warmup_steps}."
            )
        needed = ("use_distributed_optimizer", "overlap_grad_reduce")
        off = [f"{name}=false" for name in needed if not getattr(self, name)]
        if self.overlap_param_gather and off:
            yield (
                f"overlap_param_gather=true with {' and '.join(off)}: Megatron gathers parameters "
                f"during the forward pass only with use_distributed_optimizer=true and "
                f"overlap_grad_reduce=true. Leave overlap_param_gather out."
            )
        usual, slow = self.heartbeat_timeout_minutes, self.init_timeout_minutes
        if usual is not None and slow < usual:
            yield (
                f"init_timeout_minutes: {slow:g} is below heartbeat_timeout_minutes={usual:g}, and "
                f"what it covers takes longer than a step. Give both."
            )
        if self.keep_every is not None and self.keep_latest is None:
            yield (
                f"keep_every: {self.keep_every} exempts checkpoints from keep_latest. Give "
                f"keep_latest as well, or neither to keep all checkpoints."
            )
        if self.keep_every is not None and self.keep_every % self.save_interval:
            yield (
                f"keep_every: {self.keep_every} is not a multiple of save_interval="
                f"{self.save_interval}, so no such checkpoint would be saved."
            )


_FIRST = {
    "micro_batch_size": "batch",
    "max_steps": "steps",
    "lr": "optimizer",
    "val_check_interval": "evaluation and logging",
    "save_interval": "checkpoints",
    "heartbeat_timeout_minutes": "stalled ranks",
}
"""First field of each group of settings -> title of the group."""


def groups() -> dict[str, list[str]]:
    """Return the fields of :class:`Training` by the title of their group."""
    found: dict[str, list[str]] = {}
    for field in dataclasses.fields(Training):
        if field.name in _FIRST:
            found[_FIRST[field.name]] = names = []
        names.append(field.name)
    return found


def read_training(
    base: Training, changes: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> Training:
    """Return ``base`` with the changes of a user.

    Args:
        base: settings to change.
        changes: values as YAML gives them, by name of a field.
        names: what the user calls a field, if not by its name.

    Raises:
        UserError: everything that is wrong, at once. Where a value is, relations to it are not
            validated.
    """
    found: dict[str, Any] = {}
    messages: list[str] = []
    for key, value in changes.items():
        with collect_violations(messages):
            found[key] = read_value(Training, key, value, (names or {}).get(key, key))
    invalid = changes.keys() - found.keys()
    try:
        training = dataclasses.replace(base, **found)
    except ValidationError as error:
        (cause,) = (item["ctx"]["error"] for item in error.errors())
        assert isinstance(cause, UserError)
        for message in cause.messages:
            if not any(re.search(rf"\b{name}[:=]", message) for name in invalid):
                messages.append(message)
    raise_violations(messages)
    return training
