"""``nemo-megacpp data``: prepare, adopt and inspect."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nemo_megacpp.data.corpus import USUAL_DOCUMENT_BYTES
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
        description="Split documents into train and held-out, train a byte-level BPE (or take one) "
        "and write Megatron .bin/.idx. A text file is a document; so is each line of a .jsonl "
        "file. Folders are searched recursively, hidden files left out; .gz, .bz2, .xz and .zst "
        "are decompressed. If it is interrupted or killed, the same command resumes it.",
    )
    prepare.add_argument("paths", nargs="+", metavar="PATH", help="file or folder of text or JSONL")
    prepare.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    prepare.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens of the BPE to train (default 8192)"
    )
    prepare.add_argument(
        "--tokenizer", metavar="DIR", help="use this Hugging Face tokenizer instead of training one"
    )
    _add_held_out(prepare)
    prepare.add_argument(
        "--text-key", default="text", metavar="K", help="JSONL field with the text (default text)"
    )
    prepare.add_argument("--max-bytes", type=int, metavar="N", help="use no more text than this")
    prepare.add_argument(
        "--max-document-bytes",
        type=int,
        default=USUAL_DOCUMENT_BYTES,
        metavar="N",
        help="leave out (and count) larger documents (default %(default)s)",
    )
    prepare.add_argument(
        "--document-multiple",
        type=int,
        default=1,
        metavar="N",
        help="fill each document with end tokens to a multiple of N, which packed_documents with "
        "CP > 1 needs: N = 2 CP (default 1: no filling)",
    )
    prepare.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: the cores where there is much text, else one)",
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace prepared data in DIR")
    prepare.set_defaults(run=_run_prepare)

    adopt = commands.add_parser(
        "adopt",
        help="train on .bin/.idx that Megatron's preprocess_data.py made, without a copy",
        description="Make a folder of prepared data over PREFIX.bin and PREFIX.idx: an index for "
        "each split and links to the tokens, each of which is checked once.",
    )
    adopt.add_argument("prefix", metavar="PREFIX", help="both files without .bin and .idx")
    adopt.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    adopt.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer that made them"
    )
    held_out = adopt.add_mutually_exclusive_group()
    _add_held_out(held_out)
    held_out.add_argument(
        "--held-out-prefix", metavar="PREFIX", help="files to hold out instead of a share"
    )
    adopt.add_argument("--overwrite", action="store_true", help="replace prepared data in DIR")
    adopt.set_defaults(run=_run_adopt)

    inspect = commands.add_parser(
        "inspect", help="check prepared data; show counts, document lengths and samples"
    )
    inspect.add_argument("folder", metavar="DIR", help="folder made by data prepare")
    inspect.add_argument(
        "--samples", type=int, default=3, metavar="N", help="documents to show (default 3)"
    )
    inspect.add_argument(
        "--rows", type=int, default=0, metavar="N", help="training rows to show, by their documents"
    )
    inspect.add_argument(
        "--seq-length", type=int, default=4096, metavar="S", help="tokens of a row (default 4096)"
    )
    inspect.set_defaults(run=_run_inspect)


def _add_held_out(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        metavar="F",
        help="share of documents (default %(default)s)",
    )


def _run_adopt(args: argparse.Namespace) -> int:
    from nemo_megacpp.data.adopt import adopt

    data = adopt(
        args.prefix,
        args.out,
        tokenizer=args.tokenizer,
        held_out=args.held_out,
        held_out_prefix=args.held_out_prefix,
        overwrite=args.overwrite,
    )
    _print_counts(make_console(_WIDTH), data)
    return 0


def _run_prepare(args: argparse.Namespace) -> int:
    from nemo_megacpp.data.prepare import prepare

    data = prepare(
        args.paths,
        args.out,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        held_out=args.held_out,
        text_key=args.text_key,
        max_bytes=args.max_bytes,
        max_document_bytes=args.max_document_bytes,
        document_multiple=args.document_multiple,
        num_workers=args.workers,
        overwrite=args.overwrite,
    )
    _print_counts(make_console(_WIDTH), data)
    return 0


def _run_inspect(args: argparse.Namespace) -> int:
    from rich.text import Text

    from nemo_megacpp.data.indexed import IndexedTokens
    from nemo_megacpp.data.prepared import PreparedData
    from nemo_megacpp.data.tokenizer import load_tokenizer

    console = make_console(_WIDTH)
    data = PreparedData.open(args.folder)
    _print_counts(console, data)
    train = IndexedTokens.open(data.train_prefix)
    _print_lengths(console, train.lengths)
    tokenizer = load_tokenizer(data.tokenizer_dir).tokenizer
    count = min(max(args.samples, 0), len(train.lengths))
    for sample in range(count):
        number = sample * len(train.lengths) // count
        ids = train.document(number, _SAMPLE_TOKENS)
        console.rule(f"train document {number}, {train.lengths[number]:,} tokens", align="left")
        console.print(Text(tokenizer.decode(ids.tolist(), skip_special_tokens=False)))
    if args.rows:
        _print_rows(console, data, tokenizer, args.rows, args.seq_length)
    return 0


def _print_rows(
    console: Console, data: PreparedData, tokenizer: Tokenizer, rows: int, seq_length: int
) -> None:
    """Show which documents training rows hold, in the order of an epoch with the usual seed."""
    from nemo_megacpp.data.rows import read_rows

    for row in read_rows(data, rows, seq_length):
        title = f"train row {row.number}: {len(row.pieces)} documents in {seq_length:,} tokens"
        table = Table(("<positions", "tokens", "document", "of its tokens", "<begins"), title)
        for piece in row.pieces:
            begins = tokenizer.decode(piece.ids[:_SAMPLE_TOKENS], skip_special_tokens=False)
            table.add(
                f"{piece.start:,} – {piece.stop - 1:,}",
                f"{piece.stop - piece.start:,}",
                f"{piece.document:,}",
                f"{piece.offset:,} – {piece.offset + piece.stop - piece.start - 1:,}",
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
    left_out = {
        "empty": "empty",
        "binary": "binary",
        "bad_utf8": "repaired UTF-8",
        "huge": f"larger than {data.request.get('max_document_bytes', 0):,} bytes",
    }
    noted = [
        f"{data.skipped[key]:,} {word}" for key, word in left_out.items() if data.skipped.get(key)
    ]
    if data.document_multiple > 1:
        padding = sum(split.padding for split in data.splits.values())
        console.print(
            f"Documents are filled to multiples of {data.document_multiple} tokens with "
            f"{padding:,} end tokens."
        )
    if noted:
        console.print("Left out or repaired: " + ", ".join(noted) + ".")


def _print_lengths(console: Console, lengths: np.ndarray) -> None:
    """Draw a histogram of document lengths in buckets of powers of two."""
    import numpy as np

    counts = np.bincount(np.floor(np.log2(lengths)).astype(int))
    table = Table(("<tokens", "documents", "<"), "train document lengths")
    for power in range(int(np.flatnonzero(counts)[0]), len(counts)):
        bar = "█" * round(_BAR_WIDTH * counts[power] / counts.max())
        table.add(f"{2**power:,} – {2 ** (power + 1) - 1:,}", f"{counts[power]:,}", bar)
    print_table(console, table)
