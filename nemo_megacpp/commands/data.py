"""``nemo-megacpp data``: prepares, adopts and inspects training data."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from nemo_megacpp.data.corpus import USUAL_DOCUMENT_BYTES, Tally
from nemo_megacpp.errors import UserError
from nemo_megacpp.printable import printable, say
from nemo_megacpp.render import Table, make_console, print_table

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from tokenizers import Tokenizer

    from nemo_megacpp.data.prepared import PreparedData

_WIDTH = 80
_BAR_WIDTH = 40
_SAMPLE_TOKENS = 80


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data`` and its commands to the command line's parsers."""
    data = subparsers.add_parser("data", help="prepare and inspect training data")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    prepare = commands.add_parser(
        "prepare",
        help="text or JSONL to Megatron .bin/.idx, with a tokenizer",
        description="Split documents into train and held-out, train a byte-level BPE (or use an "
        "existing one) and write Megatron .bin/.idx. A text file is a document; so is each line of "
        "a .jsonl file. Folders are searched recursively, hidden files ignored; .gz, .bz2, .xz and "
        ".zst are decompressed. After an interrupt or a kill, the same command resumes.",
    )
    prepare.add_argument("paths", nargs="+", metavar="PATH", help="file or folder of text or JSONL")
    prepare.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    prepare.add_argument(
        "--tokenizer", metavar="DIR", help="use this Hugging Face tokenizer instead of training one"
    )
    prepare.add_argument(
        "--text-key", default="text", metavar="K", help="JSONL field with the text (default text)"
    )
    prepare.add_argument(
        "--encoding",
        metavar="NAME",
        help="encoding of text that is not UTF-8, such as latin-1 (UTF-16 and UTF-32 with a "
        "byte-order mark need none)",
    )
    prepare.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip, count and name unreadable files and malformed JSONL lines instead of failing",
    )
    for option, default, text in (
        ("vocab-size", None, "tokens of the BPE to train (default 8192)"),
        ("max-bytes", None, "use no more text than this"),
        (
            "max-document-bytes",
            USUAL_DOCUMENT_BYTES,
            "leave out larger documents (default %(default)s)",
        ),
        (
            "document-multiple",
            1,
            "pad each document with end tokens to a multiple of N, which "
            "packed_documents with CP > 1 needs: N = 2 CP (default 1: no padding)",
        ),
        ("workers", None, "processes (default: one for a small corpus, else one per core)"),
    ):
        prepare.add_argument(f"--{option}", type=int, default=default, metavar="N", help=text)
    prepare.add_argument(
        "--side-channel",
        action="append",
        default=[],
        metavar="name=N,vocab_size=V,field=F",
        help="write the ids of a side channel beside the tokens, from a JSONL field (one integer, "
        "or one for each character), or with ngram=N in place of field=F from a hash of the last "
        "N tokens; may be given several times",
    )
    prepare.set_defaults(run=_run_prepare)

    adopt = commands.add_parser(
        "adopt",
        help="train on .bin/.idx of Megatron's preprocess_data.py, without a copy",
        description="Make a folder of prepared data over PREFIX.bin and PREFIX.idx: an index for "
        "each split and links to the tokens, each of which is checked once.",
    )
    adopt.add_argument("prefix", metavar="PREFIX", help="both files without .bin and .idx")
    adopt.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    adopt.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer that made them"
    )
    held_out = adopt.add_mutually_exclusive_group()
    held_out.add_argument(
        "--held-out-prefix", metavar="PREFIX", help="files to hold out instead of a share"
    )
    adopt.set_defaults(run=_run_adopt)
    for command, group in ((prepare, prepare), (adopt, held_out)):
        group.add_argument(
            "--held-out",
            type=float,
            default=0.05,
            metavar="F",
            help="share of documents to hold out (default %(default)s)",
        )
        command.add_argument("--overwrite", action="store_true", help="replace data in DIR")

    verification = commands.add_parser(
        "verify",
        help="compare all of prepared data with its checksums and its vocabulary",
        description="Read every byte of prepared data: checksums, and ids against the vocabulary. "
        "A run verifies a sample before it starts.",
    )
    verification.add_argument("folders", nargs="+", metavar="DIR", help="prepared data")
    verification.set_defaults(run=_run_verify)

    inspection = commands.add_parser(
        "inspect",
        help="check a sample of prepared data; show counts, document lengths and samples",
    )
    inspection.add_argument("folder", metavar="DIR", help="folder made by data prepare")
    inspection.add_argument(
        "--samples", type=int, default=3, metavar="N", help="documents to show (default 3)"
    )
    inspection.add_argument(
        "--rows", type=int, default=0, metavar="N", help="training rows to show, by their documents"
    )
    inspection.add_argument(
        "--seq-length", type=int, default=4096, metavar="S", help="tokens of a row (default 4096)"
    )
    inspection.set_defaults(run=_run_inspect)


def _run_adopt(args: argparse.Namespace) -> int:
    from nemo_megacpp.data.adopt import adopt

    names = ("prefix", "out", "tokenizer", "held_out", "held_out_prefix", "overwrite")
    _print_counts(make_console(_WIDTH), adopt(**{name: getattr(args, name) for name in names}))
    return 0


def _run_prepare(args: argparse.Namespace) -> int:
    from nemo_megacpp.data.prepare import prepare

    args.num_workers = args.workers
    args.side_channels = list(map(_side_channel, args.side_channel))
    names = inspect.signature(prepare).parameters.keys() & vars(args).keys()
    try:
        data = prepare(**{name: getattr(args, name) for name in names})
    except KeyboardInterrupt:
        # Threads of the tokenizers library panic when they meet an interpreter that is shut down.
        os._exit(128 + signal.SIGINT)
    _print_counts(make_console(_WIDTH), data)
    return 0


def _side_channel(text: str) -> dict[str, int | str]:
    """Read ``name=language,vocab_size=16,field=lang``."""
    found: dict[str, int | str] = {}
    for part in text.split(","):
        key, separator, value = part.strip().partition("=")
        if not separator or key not in ("name", "vocab_size", "field", "ngram") or key in found:
            raise UserError(
                f"--side-channel {printable(text)}: give name, vocab_size, and either field or "
                f"ngram, each once, as in name=language,vocab_size=16,field=lang."
            )
        found[key] = int(value) if key in ("vocab_size", "ngram") and value.isdigit() else value
    return found


def _run_verify(args: argparse.Namespace) -> int:
    from nemo_megacpp.data.checksums import bytes_to_read, verify
    from nemo_megacpp.data.prepared import PreparedData
    from nemo_megacpp.data.staging import bars

    for folder in args.folders:
        data = PreparedData.open(folder)
        with bars(True) as drawn:
            task = drawn.add_task("verifying", total=bytes_to_read(data.root))
            found = verify(data, advance=partial(drawn.advance, task))
        print(
            f"{folder}: {found.blocks:,} blocks, {found.bytes:,} bytes verified, every id is below "
            f"{data.vocab_size:,} ({found.seconds:.1f} s)"
        )
    return 0


def _run_inspect(args: argparse.Namespace) -> int:
    from rich.text import Text

    from nemo_megacpp.data.checksums import verify_sample
    from nemo_megacpp.data.indexed import IndexedTokens
    from nemo_megacpp.data.prepared import PreparedData
    from nemo_megacpp.data.tokenizer import load_tokenizer

    console = make_console(_WIDTH)
    data = PreparedData.open(args.folder)
    verified = verify_sample([data])
    _print_counts(console, data)
    console.print(verified, highlight=False, soft_wrap=True)
    train = IndexedTokens.open(data.train_prefix)
    _print_lengths(console, train.lengths)
    tokenizer = load_tokenizer(data.tokenizer_dir).tokenizer
    count = min(max(args.samples, 0), len(train.lengths))
    for sample in range(count):
        number = sample * len(train.lengths) // count
        ids = train.document(number, _SAMPLE_TOKENS)
        console.rule(f"train document {number}, {train.lengths[number]:,} tokens", align="left")
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        if len(ids) < train.lengths[number]:
            text = whole_lines(text)
        console.print(Text(printable(text)))
    if args.rows:
        _print_rows(console, data, tokenizer, args.rows, args.seq_length)
    return 0


def whole_lines(text: str) -> str:
    """Return the opening of a document without its last, cut line, and a mark that it goes on."""
    whole, _, cut = text.rpartition("\n")
    return f"{whole.rstrip()}\n…" if whole.strip() else f"{cut}…"


def _print_rows(
    console: Console, data: PreparedData, tokenizer: Tokenizer, rows: int, seq_length: int
) -> None:
    """Show which documents training rows hold, in the order of an epoch with the default seed."""
    from nemo_megacpp.data.packed_rows import read_rows

    for number, parts in enumerate(read_rows(data, rows, seq_length)):
        title = f"train row {number}: {len(parts)} documents in {seq_length:,} tokens"
        table = Table(("<positions", "tokens", "document", "of its tokens", "<begins"), title)
        for start, stop, document, offset, ids in parts:
            begins = tokenizer.decode(ids[:_SAMPLE_TOKENS], skip_special_tokens=False)
            table.add(
                f"{start:,} – {stop - 1:,}",
                f"{stop - start:,}",
                f"{document:,}",
                f"{offset:,} – {offset + stop - start - 1:,}",
                " ".join(begins.split())[:_BAR_WIDTH],
            )
        print_table(console, table)


def _print_counts(console: Console, data: PreparedData) -> None:
    table = Table(
        ("<split", "documents", "tokens", "bytes", "bytes/token"),
        f"{data.root}  (vocabulary {data.vocab_size:,})",
    )
    for name, split in data.splits.items():
        size, ratio = "", ""
        if split.bytes is not None:
            size, ratio = f"{split.bytes:,}", f"{split.bytes / split.tokens:.2f}"
        table.add(name, f"{split.documents:,}", f"{split.tokens:,}", size, ratio)
    print_table(console, table)
    if data.document_multiple > 1:
        padding = sum(split.padding for split in data.splits.values())
        console.print(
            f"Documents are padded to multiples of {data.document_multiple} tokens with "
            f"{padding:,} end tokens."
        )
    if data.side_channels:
        listed = (f"{c.name} ({c.source}, {c.vocab_size:,} ids)" for c in data.side_channels)
        say(f"Side channels: {', '.join(listed)}.")
    for line in Tally(Counter(data.skipped), data.skipped_names).describe():
        say(line)


def _print_lengths(console: Console, lengths: np.ndarray) -> None:
    """Draw a histogram of document lengths in buckets of powers of two."""
    import numpy as np

    counts = np.bincount(np.floor(np.log2(lengths)).astype(int))
    table = Table(("<tokens", "documents", "<"), "train document lengths")
    for power in range(int(np.flatnonzero(counts)[0]), len(counts)):
        bar = "█" * round(_BAR_WIDTH * counts[power] / counts.max())
        table.add(f"{2**power:,} – {2 ** (power + 1) - 1:,}", f"{counts[power]:,}", bar)
    print_table(console, table)
