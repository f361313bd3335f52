"""``nemo-megacpp checkpoint``: inspect, verify, reshard, export and import."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nemo_megacpp.commands.arguments import print_json
from nemo_megacpp.printable import cut, printable, say

_NAME = 200
"""Most characters of a tensor's name in a table."""
_VALUE = 2000
_PLAIN = "safetensors"
_FORMS = ("hf", "nemotron_h")
_SCRIPT = "megatron"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``checkpoint`` and its commands to the command line's parsers."""
    checkpoint = subparsers.add_parser(
        "checkpoint", help="inspect, verify, reshard, export and import checkpoints"
    )
    commands = checkpoint.add_subparsers(
        dest="checkpoint_command", required=True, metavar="COMMAND"
    )
    inspect = commands.add_parser(
        "inspect",
        help="model, step, layouts, tensors",
        description="Print a checkpoint's model, step, layouts and tensors.",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify = commands.add_parser(
        "verify",
        help="compare every byte with the manifest, and scan the pickles",
        description="Compare every byte of a checkpoint with its manifest, and scan its pickles.",
    )
    reshard = commands.add_parser(
        "reshard",
        help="save a checkpoint again in another layout",
        description="Save weights and optimizer states again as a job in another layout would "
        "have, bit for bit. A checkpoint of any layout loads into any other without this.",
    )
    export = commands.add_parser(
        "export",
        help="the model's weights as safetensors files",
        description="Write the model's weights as safetensors files with an index, each tensor "
        "whole, or as a folder that transformers loads; or a checkpoint that Megatron's script "
        "resumes, with the optimizer's state.",
    )
    back = commands.add_parser(
        "import",
        help="a checkpoint from what export wrote",
        description="Make a checkpoint of the weights in a folder that export wrote, or in one of "
        "Hugging Face's forms.",
    )
    for command, run in (
        (inspect, _inspect),
        (verify, _verify),
        (reshard, _reshard),
        (export, _export),
        (back, _import),
    ):
        command.set_defaults(run=run if run in (_inspect, _verify) else partial(_in_scratch, run))
        what = "a checkpoint, or a run folder, whose newest checkpoint is taken"
        if command is back:
            what = "a folder that export wrote, or one of transformers"
        command.add_argument("directory", type=Path, metavar="DIR", help=what)
        if command in (reshard, export, back):
            command.add_argument("out", type=Path, metavar="OUT", help="folder to create")
            command.add_argument(
                "--no-verify", action="store_true", help="do not compare DIR with its manifest"
            )
    export.add_argument(
        "--to",
        choices=(_PLAIN, *_FORMS, _SCRIPT),
        default=_PLAIN,
        help="the checkpoint's own names (default), a folder for transformers with modelling code, "
        "one of an architecture that transformers has, or a folder that Megatron's script loads",
    )
    export.add_argument(
        "--weights-only",
        action="store_true",
        help="with --to megatron: leave out the optimizer, for a script that starts a new run",
    )
    export.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="for transformers: convert to float32, bfloat16, …; default: keep",
    )
    export.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="for transformers: a tokenizer's folder or that of prepared data; default: that of "
        "the data it was trained on",
    )
    export.add_argument(
        "--no-tokenizer", action="store_true", help="for transformers: leave the tokenizer out"
    )
    back.add_argument(
        "--from",
        dest="form",
        choices=(_PLAIN, "hf"),
        default=_PLAIN,
        help="what DIR is: export's files (default), or a folder for transformers",
    )
    reshard.add_argument(
        "--layout",
        required=True,
        metavar="tp=2,pp=2,…",
        help="degrees to change in the layout that it was saved in",
    )


def _find(directory: Path) -> Path:
    """Return the checkpoint that is meant; if that is another folder, say so on stderr."""
    from nemo_megacpp.checkpoint.folder import find_checkpoint

    found = find_checkpoint(directory)
    if found != directory:
        say(f"{directory}: taking the checkpoint {found}", error=True)
    return found


def _in_scratch(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command whose temporary files, those of the libraries it imports too, are removed even
    after ``kill -9``, by the next such command."""
    from nemo_megacpp.runtime.scratch import scratch_folder

    with scratch_folder() as folder:
        tempfile.tempdir = str(folder)
        try:
            return run(args)
        finally:
            tempfile.tempdir = None


def _verify(args: argparse.Namespace) -> int:
    from nemo_megacpp.checkpoint.guard import inspect_before_load

    directory = _find(args.directory)
    say(f"{directory}: {inspect_before_load(directory)}; its pickles hold data only")
    return 0


def _reshard(args: argparse.Namespace) -> int:
    from nemo_megacpp.checkpoint.rewrite import reshard, target_layout
    from nemo_megacpp.runtime.workers import WorkerPool

    directory = _find(args.directory)
    layout = target_layout(directory, args.layout)
    split, whole = reshard(
        directory, args.out, layout, WorkerPool, verify=not args.no_verify, say=say
    )
    kept = f", {whole} kept whole" if whole else ""
    say(f"{args.out}: {split} tensors as {layout.describe()} splits them{kept}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from nemo_megacpp.checkpoint.content import CheckpointContent
    from nemo_megacpp.checkpoint.export import export
    from nemo_megacpp.checkpoint.manifest import check_manifest
    from nemo_megacpp.errors import UserError

    if args.to not in _FORMS and (args.dtype or args.tokenizer or args.no_tokenizer):
        raise UserError(
            f"--dtype, --tokenizer and --no-tokenizer go with --to {' or --to '.join(_FORMS)}."
        )
    if args.tokenizer and args.no_tokenizer:
        raise UserError("--tokenizer and --no-tokenizer do not go together.")
    if args.to == _SCRIPT:
        return _export_for_script(args, _find(args.directory))
    if args.weights_only:
        raise UserError(f"--weights-only goes with --to {_SCRIPT}; the others hold nothing else.")
    content = CheckpointContent(_find(args.directory))
    if not args.no_verify:
        say(f"{content.directory}: {check_manifest(content.directory)}")
    if args.to != _PLAIN:
        return _export_for_transformers(args, content.directory)
    index = export(content.directory, args.out)
    files = len(set(index["weight_map"].values()))
    others = len(content.other_tensors) + len(content.objects)
    left_out = f"; {others} tensors and objects of optimizer and random state left out"
    say(
        f"{args.out}: {len(index['weight_map'])} tensors, {index['metadata']['total_size']:,} "
        f"bytes, in {files} file{'s' if files > 1 else ''}{left_out if others else ''}"
    )
    return 0


def _export_for_transformers(args: argparse.Namespace, directory: Path) -> int:
    from nemo_megacpp.hf.export import export_hf
    from nemo_megacpp.hf.nemotron_h import export_nemotron_h
    from nemo_megacpp.hf.tokenizer import Choice
    from nemo_megacpp.runs.run_data import data_of_run

    write = export_hf if args.to == "hf" else export_nemotron_h
    choice = Choice(args.tokenizer, data_of_run(directory), args.no_tokenizer)
    made = write(directory, args.out, dtype=args.dtype, tokenizer=choice)
    files = f"{made.files} file{'s' if made.files > 1 else ''}"
    if made.tokenizer is not None:
        beside = f"; the tokenizer has {made.tokenizer.vocab_size:,} tokens"
    elif args.no_tokenizer:
        beside = ""
    else:
        beside = "; no tokenizer: the checkpoint names none (--tokenizer DIR adds one)"
    say(f"{args.out}: {made.tensors} tensors, {made.bytes:,} bytes, in {files}{beside}")
    return 0


def _export_for_script(args: argparse.Namespace, directory: Path) -> int:
    from nemo_megacpp.checkpoint.guard import inspect_before_load
    from nemo_megacpp.checkpoint.script_export import export_megatron

    say(f"{directory}: {inspect_before_load(directory, verify=not args.no_verify)}")
    found = export_megatron(directory, args.out, weights_only=args.weights_only)
    moments, option = "no optimizer", "--pretrained-checkpoint"
    if found.optimizer_tensors:
        moments, option = f"{found.optimizer_tensors} of the optimizer", "--load"
    say(f"{found.directory}: {found.tensors} tensors of the model, {moments}; {option} {args.out}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from nemo_megacpp.checkpoint.rewrite import import_safetensors
    from nemo_megacpp.hf.importing import import_hf
    from nemo_megacpp.runtime.workers import WorkerPool

    read = import_hf if args.form == "hf" else import_safetensors
    count = read(args.directory, args.out, WorkerPool, verify=not args.no_verify, say=say)
    say(f"{args.out}: {count} tensors; the weights only, without an optimizer")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from nemo_megacpp.checkpoint.content import describe

    found = describe(_find(args.directory))
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    model, degrees = found["model"], found["loads_in"]
    elsewhere = "not said (it has no nemo_megacpp.json: a checkpoint from elsewhere)"
    optimizer = found["optimizer_tensors"]
    lines = {
        "checkpoint": found["checkpoint"],
        "step": "not said" if found["step"] is None else found["step"],
        "model": elsewhere if model is None else _model_line(model),
        "pattern": found["pattern"] or elsewhere,
        "saved in": found["layout"] or "not said",
        "size": f"{found['bytes']:,} bytes",
        "manifest": found["manifest"],
        "optimizer": f"{optimizer} tensors" if optimizer else "none",
    }
    if degrees is not None:
        lines["loads in"] = "; ".join(
            f"{axis}={','.join(map(str, values))}" for axis, values in degrees.items()
        )
        lines[""] = "(one axis at a time, up to 64; several together as the layout rules allow)"
    for name, value in lines.items():
        say(f"{name:<10}  {cut(str(value), _VALUE)}")
    rows = [(cut(printable(name), _NAME), info) for name, info in found["tensors"].items()]
    width = max((len(name) for name, _ in rows), default=0)
    for name, info in rows:
        shape = "×".join(map(str, info["shape"])) or "scalar"
        print(f"  {name:<{width}}  {shape:>16}  {info['dtype']:<8}  {info['shards']:>3} shards")
    say(f"{len(found['tensors'])} tensors, {found['parameters']:,} elements")


def _model_line(model: dict[str, Any]) -> str:
    return (
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, vocabulary "
        f"{model['vocab_size']}, mode {model.get('mode', 'nemo_native')}"
    )
