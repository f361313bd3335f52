"""``nemo-megacpp generate``: complete prompts with the weights of a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.commands.arguments import print_json, read_count
from nemo_megacpp.errors import UserError
from nemo_megacpp.printable import say
from nemo_megacpp.render import show_bytes

if TYPE_CHECKING:
    from nemo_megacpp.checkpoint.content import CheckpointContent
    from nemo_megacpp.inference.ranks import Generated
    from nemo_megacpp.inference.request import Request
    from nemo_megacpp.inference.sampling import Sampling


def add_parser(commands: Any) -> None:
    """Add ``generate`` to the command line's parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="complete prompts with the weights of a checkpoint",
        description="Complete prompts with the weights of a checkpoint of any kind, and stream the "
        "text. Needs no NeMo.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint, or a run folder, whose newest is taken"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="to complete; may be repeated"
    )
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a file whose text is a prompt; may be repeated",
    )
    parser.add_argument("--max-new-tokens", metavar="N", help="of a completion; default: 64")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="default: 1; 0 is --greedy"
    )
    parser.add_argument("--top-k", metavar="K", help="choose among the K most probable tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="choose among the most probable tokens that together have probability P",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first prompt; default: 0"
    )
    parser.add_argument("--greedy", action="store_true", help="take the most probable token")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a completion, and is left out; may be repeated",
    )
    parser.add_argument(
        "--layout",
        metavar="tp=2",
        default="tp=1",
        help="of the ranks: tp, ep, pp; default: one rank",
    )
    parser.add_argument("--slots", metavar="N", help="sequences at once; default: all, at most 16")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: that of the saved weights"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="a tokenizer's folder or that of prepared data; default: that of the data it was "
        "trained on",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE.yaml",
        help="the model of a checkpoint that does not say it (of Megatron's script)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the checkpoint with its manifest"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Stream the completions to standard output, and print the times on standard error.

    Raises:
        UserError: anything that cannot be read or does not fit together, or NaN logits.
    """
    from nemo_megacpp.checkpoint.content import CheckpointContent
    from nemo_megacpp.checkpoint.guard import inspect_before_load
    from nemo_megacpp.inference.ranks import generate
    from nemo_megacpp.inference.transcript import Transcript

    sampling = _sampling(args)
    texts = [*args.prompt, *map(_text, args.file)]
    if not texts:
        raise UserError("There is nothing to complete: give --prompt TEXT or --file FILE.")
    content = CheckpointContent(args.checkpoint)
    request = _request(args, content, texts, sampling)
    verified = inspect_before_load(content.directory, verify=not args.no_verify)
    say(
        f"{content.directory}: {verified}; {request.layout.describe()}, {request.dtype}", error=True
    )
    found = generate(request, _silent if args.json else Transcript(texts))
    if args.json:
        print_json(_document(request, found))
    else:
        say("\n".join(_lines(found)), error=True)
    return 0


def _silent(index: int, text: str, ended: bool) -> None:
    """Emit nothing."""


def _sampling(args: argparse.Namespace) -> Sampling:
    from nemo_megacpp.inference.sampling import GREEDY, Sampling

    top_k = None if args.top_k is None else read_count("--top-k", args.top_k)
    if not args.greedy:
        return Sampling(args.temperature, top_k, args.top_p, args.seed)
    given = [name for name in ("temperature", "top_k", "top_p") if name in args.given_options]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UserError(f"--greedy takes the most probable token: leave {option} out.")
    return GREEDY


def _text(file: Path) -> str:
    from nemo_megacpp.data.text_encoding import decode

    text, problem = decode(file.read_bytes(), None)
    if text is None or problem:
        raise UserError(f"{file} is not text in UTF-8.")
    return text


def _request(
    args: argparse.Namespace, content: CheckpointContent, texts: list[str], sampling: Sampling
) -> Request:
    from nemo_megacpp.checkpoint.identity import validate_same_model
    from nemo_megacpp.inference.request import make_request
    from nemo_megacpp.recipes.recipe import resolve
    from nemo_megacpp.runs.run_data import data_of_run

    model = None
    if args.recipe is not None:
        recipe = resolve(args.recipe)
        validate_same_model(content.directory, recipe.model, recipe.pattern.letters, None)
        model = recipe.model
    new, slots = args.max_new_tokens, args.slots
    return make_request(
        content,
        texts,
        sampling,
        model=model,
        layout=args.layout,
        tokenizer=args.tokenizer,
        near=data_of_run(content.directory),
        max_new_tokens=None if new is None else read_count("--max-new-tokens", new, 2**31),
        stop=args.stop,
        slots=None if slots is None else read_count("--slots", slots),
        precision=args.precision,
    )


def _lines(found: Generated) -> list[str]:
    times = found.times
    first = min(each.first_token_seconds for each in found.completions)
    lines = [
        f"weights loaded in {found.load_seconds:.1f} s; states of all slots: "
        f"{show_bytes(found.state_bytes)} on a rank",
        f"first token after {first:.3f} s",
        f"prefill: {times.prefill_tokens:,} tokens, "
        f"{_rate(times.prefill_tokens, times.prefill_seconds):,.0f} tokens/s",
    ]
    if times.decode_tokens:
        rate = _rate(times.decode_tokens, times.decode_seconds)
        lines.append(f"decode: {times.decode_tokens:,} tokens, {rate:,.0f} tokens/s")
    return lines


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def _document(request: Request, found: Generated) -> dict[str, Any]:
    return {
        "checkpoint": str(request.checkpoint),
        "layout": request.layout.short(),
        "dtype": request.dtype,
        "completions": [
            {
                "prompt": text,
                "prompt_tokens": len(each.prompt.tokens),
                "text": each.text,
                "tokens": each.tokens,
                "reason": each.reason,
                "seed": each.prompt.sampling.seed,
                "first_token_seconds": each.first_token_seconds,
            }
            for text, each in zip(request.texts, found.completions, strict=True)
        ],
        "times": dataclasses.asdict(found.times),
        "load_seconds": found.load_seconds,
        "state_bytes": found.state_bytes,
    }
