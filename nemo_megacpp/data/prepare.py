"""Turn text into a folder that Megatron and NeMo train on.

Three passes over the text: survey and split, train the BPE, encode. Each reads shard by shard, in
one process or several, with the same result. The folder gets its name at the end, when it is
complete. An interrupted preparation resumes after the last complete shard when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nemo_megacpp.data import shards as shards_module
from nemo_megacpp.data.checksums import write_checksums
from nemo_megacpp.data.corpus import (
    MAX_DOCUMENT_BYTES,
    USUAL_DOCUMENT_BYTES,
    Reading,
    Tally,
    find_files,
)
from nemo_megacpp.data.encode import encode, join_parts, part_folder, sample, survey
from nemo_megacpp.data.indexed import token_dtype
from nemo_megacpp.data.prepared import (
    PreparedChannel,
    PreparedData,
    Request,
    SplitCounts,
    reusable,
)
from nemo_megacpp.data.shards import Shard, cut, usual_workers, workers
from nemo_megacpp.data.split import PLACE, SplitPlan, check_held_out, plan_split
from nemo_megacpp.data.staging import bars, clear_stage, staging
from nemo_megacpp.data.text_encoding import check_encoding
from nemo_megacpp.data.tokenizer import (
    check_vocab_size,
    copy_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from nemo_megacpp.errors import UserError, validate_all
from nemo_megacpp.printable import say
from nemo_megacpp.side_channels import read_side_channels

DEFAULT_VOCAB_SIZE = 8192
TOKENIZER_BYTES = 200_000_000
"""A BPE is trained on no more text than this: more changes few merges and costs time and memory."""
MAX_BAD = 1000
"""The survey stops at so many bad files and lines: the cause is then one for all."""

_Each = Callable[..., Iterator[Any]]


def prepare(
    paths: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    held_out: float = 0.05,
    text_key: str = "text",
    encoding: str | None = None,
    skip_bad: bool = False,
    max_bytes: int | None = None,
    max_document_bytes: int = USUAL_DOCUMENT_BYTES,
    document_multiple: int = 1,
    side_channels: Iterable[Mapping[str, Any]] = (),
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PreparedData:
    """Prepare text for pre-training: tokenizer, ``train`` and ``heldout`` in ``.bin/.idx``.

    A folder that an equal request made from unchanged files is checked and reused.

    Args:
        paths: files and folders of text and JSONL, also as ``.gz``, ``.bz2``, ``.xz``, ``.zst``.
        out: the folder to make.
        vocab_size: vocabulary of the BPE to train; default `DEFAULT_VOCAB_SIZE`, or what a small
            corpus yields. The BPE is trained on documents of the train split only.
        tokenizer: folder of a Hugging Face ``tokenizer.json`` to use instead.
        held_out: share of documents to hold out.
        text_key: field of a JSONL line that holds the text.
        encoding: of text that is not UTF-8 and has no byte-order mark.
        skip_bad: skip unreadable files and malformed lines, and count them.
        max_bytes: use no more text than this; a hash decides which documents.
        max_document_bytes: leave out documents that are larger, and count them.
        document_multiple: end each document with as many EOS as make its length a multiple of this:
            with 2·CP, packed documents can be split over CP ranks.
        side_channels: ids to write beside the tokens, each with ``name``, ``vocab_size`` and its
            source (:class:`nemo_megacpp.side_channels.SideChannel`).
        num_workers: processes; default one for a small corpus, else one per core.
        overwrite: replace prepared data in ``out``.
        progress: draw bars on standard error.

    Raises:
        UserError: invalid arguments, bad input files (all are named), too little text, or an
            ``out`` that cannot be written or holds something else.
    """
    out, paths = Path(out), list(paths)
    validate_all(
        lambda: None if vocab_size is None else check_vocab_size(vocab_size),
        lambda: check_held_out(held_out),
        lambda: _check_range("max_bytes", max_bytes),
        lambda: _check_range("max_document_bytes", max_document_bytes, MAX_DOCUMENT_BYTES),
        lambda: _check_range("document_multiple", document_multiple),
        lambda: _check_range("workers", num_workers),
    )
    channels = read_side_channels(list(side_channels))
    code = encoding and check_encoding(encoding)
    reading = Reading(text_key, max_document_bytes, code, channels)
    written = [PreparedChannel(c.name, c.vocab_size, c.source) for c in channels]
    known = load_tokenizer(tokenizer) if tokenizer is not None else None
    if known is not None and vocab_size not in (None, known.vocab_size):
        raise UserError(
            f"Tokenizer {str(tokenizer)!r} has {known.vocab_size} tokens, not {vocab_size}; "
            "leave the vocabulary size out."
        )
    tally = Tally()
    files = find_files(paths, tally, exclude=out)
    rows = sorted([file.key, file.size, file.mtime_ns] for file in files)
    request: Request = {
        "files": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "vocab_size": vocab_size,
        "tokenizer": known.fingerprint if known is not None else None,
        "held_out": held_out,
        "max_bytes": max_bytes,
        "document_multiple": document_multiple,
        "skip_bad": skip_bad,
        **asdict(reading),
        "side_channels": json.dumps([asdict(channel) for channel in written]) if written else None,
    }
    existing = reusable(out, request, overwrite)
    if existing is not None:
        clear_stage(out)
        return existing
    shards = cut(files, reading.encoding)
    count = usual_workers(shards) if num_workers is None else min(num_workers, len(shards) or 1)
    staged = {**request, "shard_bytes": shards_module.SHARD_BYTES}
    with staging(out, staged) as stage, bars(progress) as drawn:
        total = sum(shard.size for shard in shards)

        def each(title: str, function: Callable[[Shard], Any], some: list[Shard]) -> Iterator[Any]:
            done = total - sum(shard.size for shard in some)
            task = drawn.add_task(title, total=total, completed=done)
            for shard, result in zip(some, run(function, some), strict=True):
                drawn.advance(task, shard.size)
                yield result

        missing = [shard for shard in shards if not part_folder(stage.parts, shard).exists()]
        if stage.resumed:
            done = len(shards) - len(missing)
            print(f"Resuming an interrupted preparation: {done} of {len(shards)} shards done.")
        try:
            with workers(count) as run:
                if (saved := stage.read("plan.json")) is None:
                    places = _survey(each, shards, reading, tally, skip_bad)
                    try:
                        plan = plan_split(
                            places,
                            held_out=held_out,
                            max_bytes=max_bytes,
                            tokenizer_bytes=TOKENIZER_BYTES,
                        )
                    except UserError as error:
                        raise UserError("\n".join([str(error), *tally.describe()])) from error
                    stage.write("plan.json", {"plan": asdict(plan), "tally": vars(tally)})
                else:
                    plan = SplitPlan(**saved["plan"])
                    tally = Tally(Counter(saved["tally"]["counts"]), saved["tally"]["names"])
                folder = stage.folder / "tokenizer"
                if not folder.exists():
                    begun = stage.folder / ".tokenizer"
                    if tokenizer is None:
                        texts = each(
                            "training the tokenizer", partial(sample, reading, plan), shards
                        )
                        _train((text for some in texts for text in some), plan, vocab_size, begun)
                    else:
                        copy_tokenizer(Path(tokenizer), begun)
                    begun.rename(folder)
                # Loaded from where it will be read, so the fingerprint is that of the written file.
                loaded = load_tokenizer(folder, tried=True)
                dtype = token_dtype(loaded.vocab_size)
                options = (reading, plan, folder, dtype, document_multiple, stage.parts)
                for _ in each("encoding", partial(encode, *options), missing):
                    pass
                counts = join_parts(stage.parts, shards, dtype, stage.whole, channels)
        except KeyboardInterrupt:
            drawn.stop()
            message = "Interrupted. Run the same command to resume; progress is saved in"
            say(f"{message} {stage.folder}.", error=True)
            raise
        copy_tokenizer(folder, stage.whole / "tokenizer")
        PreparedData(
            root=out,
            vocab_size=loaded.vocab_size,
            eos_id=loaded.eos_id,
            tokenizer_fingerprint=loaded.fingerprint,
            splits={
                split: SplitCounts(plan.documents[split], tokens, plan.bytes[split], padding)
                for split, (tokens, padding) in counts.items()
            },
            skipped=dict(tally.counts),
            skipped_names=tally.names,
            source={"paths": [str(Path(path).absolute()) for path in paths], "files": len(files)},
            request=request,
            document_multiple=document_multiple,
            side_channels=written,
        ).write_manifest(stage.whole)
        write_checksums(stage.whole)
    return PreparedData.open(out)


def _check_range(name: str, value: int | None, highest: int | None = None) -> None:
    if value is not None and (value < 1 or (highest is not None and value > highest)):
        upper = "" if highest is None else f" and at most {highest:,}, Megatron's limit"
        raise UserError(f"{name} is {value:,}; it must be at least 1{upper}.")


def _survey(
    each: _Each, shards: list[Shard], reading: Reading, tally: Tally, skip_bad: bool
) -> np.ndarray:
    """Return the hashes and sizes of all documents; add to ``tally`` what was left out.

    Raises:
        UserError: bad files, unless they are to be skipped.
    """
    found = []
    for places, of_shard in each("reading", partial(survey, reading), shards):
        found.append(places)
        tally.add(of_shard)
        if not skip_bad and tally.counts["bad_line"] + tally.counts["bad_file"] >= MAX_BAD:
            break
    bad, named = tally.counts["bad_file"], tally.names.get("bad_file", [])
    if bad and not skip_bad:
        listed = "\n  ".join(named)
        more = f"\n  and {bad - len(named):,} more" if bad > len(named) else ""
        at_least = "At least " if len(found) < len(shards) else ""
        files = "file is" if bad == 1 else "files are"
        raise UserError(
            f"{at_least}{bad:,} input {files} unreadable or malformed:\n  {listed}{more}\n"
            f"Repair them, or skip what is bad in them with --skip-bad."
        )
    return np.concatenate([np.empty(0, PLACE), *found])


def _train(texts: Iterator[str], plan: SplitPlan, vocab_size: int | None, folder: Path) -> None:
    trained = train_tokenizer(texts, vocab_size or DEFAULT_VOCAB_SIZE)
    reached = trained.get_vocab_size()
    if vocab_size is not None and reached != vocab_size:
        raise UserError(
            f"This text is too short for a vocabulary of {vocab_size}: its "
            f"{plan.tokenizer_bytes:,} bytes of training text yield {reached} tokens. "
            f"Use --vocab-size {reached} or less, or add text."
        )
    if reached < DEFAULT_VOCAB_SIZE and vocab_size is None:
        print(f"Vocabulary: {reached} tokens, all that this text yields.")
    if plan.tokenizer_bytes < plan.bytes["train"]:
        print(f"Tokenizer trained on {plan.tokenizer_bytes:,} of {plan.bytes['train']:,} bytes.")
    save_tokenizer(trained, folder)
