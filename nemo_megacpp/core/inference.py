"""Megatron's inference context, and the mode that its models ask for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.inference import utils
from megatron.core.inference.contexts import StaticInferenceContext

_MODE: Any = getattr(utils, "InferenceMode", None)


def inference_mode() -> AbstractContextManager[Any]:
    """Return the context in which Megatron's modules know that they infer. Until 0.16 they ask
    whether they train, from 0.19 on they read a flag of the process."""
    return nullcontext() if _MODE is None else _MODE.active()


def all_logits(context: StaticInferenceContext, wanted: bool) -> None:
    """Choose whether the model returns the logits of all tokens that it is given, or of the last
    one. From 0.19 on the choice stands in a configuration of the context."""
    holder: Any = getattr(context, "config", context)
    holder.materialize_only_last_token_logits = not wanted
