"""``nemo-megacpp evaluate``: the held-out loss of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import print_json, read_count
from nemo_megacpp.printable import say

if TYPE_CHECKING:
    from nemo_megacpp.checkpoint.content import CheckpointContent
    from nemo_megacpp.data.prepared import PreparedData
    from nemo_megacpp.evaluation.heldout import Dtype, Request
    from nemo_megacpp.layout import ParallelLayout

_WIDTH = 100
"""Columns of the tables."""


def add_parser(commands: Any) -> None:
    """Add ``evaluate`` to the command line's parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="the held-out loss of a checkpoint, in any layout",
        description="Predict the held-out split of prepared data with the weights of a checkpoint: "
        "loss, bits per byte, and the loss by position. Starts the ranks of the layout on this "
        "machine; needs no NeMo.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint, or a run folder, whose newest is taken"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="of 'data prepare' or 'adopt'; default: the built-in corpus"
    )
    parser.add_argument(
        "--layout", metavar="tp=2,pp=2,…", default="tp=1", help="of the ranks; default: one rank"
    )
    parser.add_argument("--seq-length", metavar="N", help="tokens of a row; default: the model's")
    parser.add_argument("--rows", metavar="N", help="predict the first N rows only")
    parser.add_argument(
        "--micro-batch-size", metavar="N", default="1", help="rows of a pass; default: 1"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: that of the saved weights"
    )
    parser.add_argument(
        "--packed-documents",
        action="store_true",
        help="reset the model at each document, as a run with packed_documents=true does",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE.yaml",
        help="the model of a checkpoint that does not say it (of Megatron's script)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the checkpoint with its manifest"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Print the evaluation.

    Raises:
        UserError: anything that cannot be read or does not fit together, or a loss that is NaN.
    """
    from nemo_megacpp.checkpoint.content import CheckpointContent
    from nemo_megacpp.checkpoint.guard import inspect_before_load
    from nemo_megacpp.evaluation.report import evaluate, evaluation_document, evaluation_tables
    from nemo_megacpp.render import make_console, print_table
    from nemo_megacpp.runtime.workers import WorkerPool, device_for

    request = read_request(args, CheckpointContent(args.checkpoint))
    verified = inspect_before_load(request.checkpoint, verify=not args.no_verify)
    say(f"{request.checkpoint}: {verified}", error=args.json)
    layout, rows = request.layout, request.rows
    say(
        f"{layout.describe()}, {request.dtype}: {len(rows):,} held-out rows of "
        f"{rows.seq_length:,} tokens",
        error=args.json,
    )
    device = device_for(layout.world)
    found = evaluate(request, lambda ranks: WorkerPool(ranks, device=device))
    if args.json:
        print_json(evaluation_document(found))
        return 0
    console = make_console(_WIDTH)
    for table in evaluation_tables(found):
        print_table(console, table)
    return 0


def read_request(args: argparse.Namespace, content: CheckpointContent) -> Request:
    """Return what the arguments ask for.

    Raises:
        UserError: a model that is not known or does not fit the checkpoint, another tokenizer, or
            an illegal layout.
    """
    from nemo_megacpp.checkpoint.content import saved_shape
    from nemo_megacpp.checkpoint.rewrite import validate_buildable
    from nemo_megacpp.evaluation.heldout import Request
    from nemo_megacpp.evaluation.rows import HeldoutRows
    from nemo_megacpp.layout import ParallelLayout, validate_layout
    from nemo_megacpp.proof.rank_limit import validate_ranks
    from nemo_megacpp.side_channels import read_side_channels

    model, data = _model_and_data(args, content)
    if args.seq_length is not None:
        model["seq_length"] = read_count("--seq-length", args.seq_length)
    size = read_count("--micro-batch-size", args.micro_batch_size)
    most = None if args.rows is None else read_count("--rows", args.rows, 2**53)
    layout = ParallelLayout.parse(args.layout)
    validate_ranks(layout, "evaluate", "the loss")
    identity: Any = {"model": model, "tokenizer": None, "step": 0}
    validate_layout(layout, saved_shape(content.directory, identity))
    validate_buildable(content.directory, model, layout)
    channels = read_side_channels(model.get("side_channels"))
    data.validate_side_channels(channels)
    rows = HeldoutRows(data, _length(model), args.packed_documents, channels, most)
    _validate_packing(rows, layout, size)
    return Request(content.directory, model, layout, _dtype(args, content), rows, size)


def _model_and_data(
    args: argparse.Namespace, content: CheckpointContent
) -> tuple[dict[str, Any], PreparedData]:
    from nemo_megacpp.checkpoint.identity import saved_model, validate_same_model
    from nemo_megacpp.errors import UserError
    from nemo_megacpp.recipes.recipe import resolve

    identity = content.identity
    if args.recipe is not None:
        recipe = resolve(args.recipe)
        data = _data(args.data, recipe.model["vocab_size"])
        model = {**recipe.model, "vocab_size": data.vocab_size}
        fingerprint = data.tokenizer_fingerprint
        validate_same_model(content.directory, model, recipe.pattern.letters, fingerprint)
        return model, data
    if identity is None:
        raise UserError(
            f"{content.directory} does not say which model it holds (it has no nemo_megacpp.json): "
            f"give --recipe NAME, or a YAML file of the recipe."
        )
    model = identity["model"]
    if modules := model.get("family_modules"):
        raise UserError(
            f"{content.directory} names family_modules={modules}, and evaluate imports no code "
            f"that a checkpoint names: give --recipe FILE.yaml, which may name it."
        )
    words = saved_model(content.directory, identity)[0]["vocab_size"]
    data, made_with = _data(args.data, words), identity["tokenizer"]
    fingerprint = data.tokenizer_fingerprint
    if made_with is not None and made_with != fingerprint:
        raise UserError(
            f"{content.directory} was trained on data of another tokenizer ({made_with[:12]}…) "
            f"than {data.root} ({fingerprint[:12]}…): its ids mean other text. Prepare the data "
            f"with the tokenizer of the training data (data prepare --tokenizer DIR)."
        )
    if words != data.vocab_size:
        raise UserError(
            f"{content.directory} has a vocabulary of {words}, and {data.root} one of "
            f"{data.vocab_size}."
        )
    return {**model}, data


def _data(folder: str | None, vocab_size: int) -> PreparedData:
    from nemo_megacpp.data.builtin import ensure_builtin
    from nemo_megacpp.data.prepared import PreparedData

    return ensure_builtin(vocab_size) if folder is None else PreparedData.open(folder)


def _length(model: dict[str, Any]) -> int:
    from nemo_megacpp.config import HybridConfig

    length = model.get("seq_length", HybridConfig.seq_length)
    assert isinstance(length, int)
    return length


def _dtype(args: argparse.Namespace, content: CheckpointContent) -> Dtype:
    if args.precision is not None:
        return "float32" if args.precision == "fp32" else "bfloat16"
    dtypes = [info.dtype for info in content.model_tensors.values()]
    return "bfloat16" if dtypes.count("bfloat16") > len(dtypes) // 2 else "float32"


def _validate_packing(rows: Any, layout: ParallelLayout, size: int) -> None:
    from nemo_megacpp.errors import UserError

    if not rows.packed:
        return
    multiple, cp = rows.data.document_multiple, layout.cp
    if size != 1:
        raise UserError(
            f"--packed-documents: a microbatch of packed documents is one row, and "
            f"--micro-batch-size is {size}."
        )
    if cp > 1 and multiple % (2 * cp):
        raise UserError(
            f"--packed-documents with CP={cp}: a document needs a multiple of {2 * cp} tokens, and "
            f"those of {rows.data.root} have multiples of {multiple}. Prepare it with "
            f"--document-multiple {2 * cp}, or use cp=1."
        )
