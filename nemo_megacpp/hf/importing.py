"""A checkpoint of a folder in one of Hugging Face's forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from nemo_megacpp.checkpoint.folder import WEIGHTS, new_folder
from nemo_megacpp.checkpoint.identity import FILE as IDENTITY
from nemo_megacpp.checkpoint.identity import Identity, described_model
from nemo_megacpp.checkpoint.manifest import FILE as MANIFEST
from nemo_megacpp.checkpoint.manifest import check_manifest
from nemo_megacpp.checkpoint.rewrite import finish, refusals, save_whole
from nemo_megacpp.errors import UserError
from nemo_megacpp.hf import nemotron_h, upstream
from nemo_megacpp.hf.exchange import EMBEDDING, HEAD, Exchange, exchanges
from nemo_megacpp.hf.folder import CONFIG, read_config, read_weights
from nemo_megacpp.hf.settings import DTYPES, build_config, no_model
from nemo_megacpp.printable import shown
from nemo_megacpp.runtime.workers import WorkerPool

if TYPE_CHECKING:
    from torch import Tensor

StartRanks = Callable[[int], AbstractContextManager[Any]]

_EXPORTED = {"nemo_megacpp": exchanges, nemotron_h.MODEL_TYPE: nemotron_h.exchanges}
"""``model_type`` of an export -> what moves where."""


class _Source(TypedDict):
    prefix: Literal["", "module.", "model."]
    identity: Identity


@dataclass(frozen=True)
class Imported:
    """What a folder becomes.

    Attributes:
        identity: of the checkpoint.
        prefix: of the names of its tensors.
        moves: from the checkpoint to the folder's form.
    """

    identity: Identity
    prefix: str
    moves: list[Exchange]


def import_hf(
    folder: Path,
    out: Path,
    start: StartRanks = WorkerPool,
    *,
    verify: bool = True,
    say: Callable[[str], object] = str,
) -> int:
    """Make a checkpoint of a folder in one of Hugging Face's forms.

    The forms: what :func:`nemo_megacpp.hf.export.export_hf` and
    :func:`nemo_megacpp.hf.nemotron_h.export_nemotron_h` write, bit for bit, and Mamba-2 models from
    elsewhere (:mod:`nemo_megacpp.hf.upstream`). The checkpoint has weights only, whole, and loads
    into any layout.

    Args:
        folder: with ``config.json`` and weights. Its code is not run.
        out: a new folder.
        start: starts ranks; one saves the tensors.
        verify: compare the folder with its manifest first, if it has one.
        say: is called with what was verified.

    Returns:
        Number of tensors.

    Raises:
        UserError: a damaged folder, a model that this package has not, or an ``out`` that exists.
    """
    if verify and (folder / MANIFEST).exists():
        say(f"{folder}: {check_manifest(folder)}")
    described, tensors = _read(folder)
    validate_tensors(folder, described.identity, tensors)
    with new_folder(out) as partial:
        weights = partial / WEIGHTS
        weights.mkdir()
        with start(1) as ranks, refusals(weights, out):
            ranks.run(1, import_on_rank, folder, weights)
        finish(partial, described.identity)
    return len(tensors)


def _read(folder: Path) -> tuple[Imported, dict[str, Tensor]]:
    """Return what a folder becomes, and the tensors of the checkpoint.

    Raises:
        UserError: the folder is damaged, or holds a model that this package has not.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind in _EXPORTED and "source" in config:
        held = read_weights(folder)
        described = _of_export(folder, config)
    elif kind == upstream.MODEL_TYPE or upstream.is_mamba_ssm(config):
        held = read_weights(folder)
        described = Imported(*_with_prefix(upstream.describe(folder, config, held)))
    else:
        raise UserError(
            f"{folder / CONFIG} describes model_type={shown(str(kind))}; what can be imported is "
            f"an export ({', '.join(_EXPORTED)}), and a Mamba-2 model of transformers or mamba_ssm."
        )
    return described, take(described.moves, held)


def _with_prefix(found: tuple[Identity, list[Exchange]]) -> tuple[Identity, str, list[Exchange]]:
    return found[0], "", found[1]


def _of_export(folder: Path, config: dict[str, Any]) -> Imported:
    import torch
    from pydantic import TypeAdapter, ValidationError

    try:
        held = TypeAdapter(_Source).validate_python(config.get("source"), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / CONFIG} is damaged: source.{place}: {first['msg']}.") from None
    identity: Identity = held["identity"]
    if identity["model"].get("family_modules"):
        raise UserError(f"{folder / CONFIG} names {IDENTITY} with family_modules: refused.")
    described_model(folder / CONFIG, identity)
    # The dtype decides on nothing but the router's default, which no tensor depends on.
    model = build_config(identity["model"], torch.float32)
    return Imported(identity, held["prefix"], _EXPORTED[config["model_type"]](model))


def take(moves: Sequence[Exchange], held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint's tensors, made of a folder's.

    Raises:
        UserError: the folder lacks some, or has others.
    """
    wanted = {name for move in moves for name in move.theirs}
    for text, names in (("lacks", wanted - held.keys()), ("also holds", held.keys() - wanted)):
        if names:
            few = ", ".join(sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"The folder {text} {few}{more}.")
    made: dict[str, Tensor] = {}
    for move in moves:
        try:
            parts = move.back([held[name] for name in move.theirs])
        except (RuntimeError, IndexError, TypeError):  # a split that their shapes do not allow
            few = ", ".join(f"{name} {tuple(held[name].shape)}" for name in move.theirs[:3])
            raise UserError(f"The shapes are not those of the model: {few}.") from None
        made |= dict(zip(move.ours, parts, strict=True))
    return made


def validate_tensors(folder: Path, identity: Identity, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are no parameters of a model: their dtypes, and their rows of tokens.

    Raises:
        UserError: naming the first of them.
    """
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in DTYPES:
            raise UserError(f"{folder}: {name} has dtype {kind}; weights are {', '.join(DTYPES)}.")
    model, _ = described_model(folder / CONFIG, identity)
    words, hidden = model["vocab_size"], model["hidden_size"]
    for name in {EMBEDDING, HEAD} & tensors.keys():
        shape = tuple(tensors[name].shape)
        if len(shape) != 2 or not 0 < words <= shape[0] or shape[1] != hidden:
            raise UserError(
                f"{folder}: {name} has the shape {shape}, and the model of {CONFIG} a vocab_size "
                f"of {words} and a hidden_size of {hidden}."
            )


def validate_shapes(folder: Path, model: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse tensors of other shapes than the model's, which is built without memory.

    Raises:
        UserError: naming the first three.
    """
    import torch

    from nemo_megacpp.checkpoint.dcp import model_sharded_state_dict
    from nemo_megacpp.checkpoint.weights import tensor_shapes
    from nemo_megacpp.layout import ParallelLayout
    from nemo_megacpp.runtime.distributed import start_model_parallel
    from nemo_megacpp.specs.hybrid_model import build_hybrid_chunks

    start_model_parallel(ParallelLayout())
    config = build_config(model, torch.float32)
    config.perform_initialization = False
    try:
        with torch.device("meta"):
            wanted = tensor_shapes(model_sharded_state_dict(build_hybrid_chunks(config)))
    except UserError:
        raise
    except Exception as error:  # Megatron's assertions
        raise no_model(error) from None
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} in place of {shape}"
        for name, shape in wanted.items()
        if shape is not None and name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{folder} does not hold the model of its {CONFIG}: {'; '.join(wrong[:3])}{more}."
        )


def import_on_rank(folder: Path, out: Path) -> None:
    """Save the tensors of a folder, whole, into the weights' folder ``out``."""
    described, tensors = _read(folder)
    validate_shapes(folder, described.identity["model"], tensors)
    save_whole(
        {described.prefix + name: tensor for name, tensor in tensors.items()},
        out,
        f"{folder} is unchanged.",
    )
