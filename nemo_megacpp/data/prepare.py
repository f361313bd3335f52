"""Turn text into a folder that Megatron and NeMo train on.

Three passes over the text: survey and split, train the BPE, encode. Each goes shard by shard, in
one process or several, with the same result. The folder appears at the end under its name, whole.
An interrupted preparation resumes from its last whole shard when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.data import shards as shards_module
from nemo_megacpp.data.corpus import (
    MAX_DOCUMENT_BYTES,
    USUAL_DOCUMENT_BYTES,
    SourceFile,
    find_files,
)
from nemo_megacpp.data.encode import Encoding, Reading, Sampling, join_parts, part_folder
from nemo_megacpp.data.indexed import token_dtype
from nemo_megacpp.data.prepared import PreparedData, SplitCounts, reusable
from nemo_megacpp.data.progress import bars
from nemo_megacpp.data.shards import Run, Shard, cut, usual_workers, workers
from nemo_megacpp.data.split import SPLITS, Places, SplitPlan, check_held_out, plan_split
from nemo_megacpp.data.staging import Stage, clear_stage, staging
from nemo_megacpp.data.tokenizer import (
    check_vocab_size,
    copy_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

DEFAULT_VOCAB_SIZE = 8192
TOKENIZER_BYTES = 200_000_000
"""A BPE sees no more text than this: more changes few merges and costs time and memory."""

_SKIPPED = ("empty", "binary", "bad_utf8", "huge")


def prepare(
    paths: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    held_out: float = 0.05,
    text_key: str = "text",
    max_bytes: int | None = None,
    max_document_bytes: int = USUAL_DOCUMENT_BYTES,
    document_multiple: int = 1,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PreparedData:
    """Prepare text for pre-training: tokenizer, ``train`` and ``heldout`` in ``.bin/.idx``.

    A folder that an equal request made from unchanged files is checked and reused.

    Args:
        paths: Files and folders of text and JSONL, also as ``.gz``, ``.bz2``, ``.xz``, ``.zst``.
        out: The folder to make.
        vocab_size: Vocabulary of the BPE to train; default `DEFAULT_VOCAB_SIZE`, or what a small
            corpus yields. Only the training documents are seen.
        tokenizer: A folder with a Hugging Face ``tokenizer.json`` to use instead.
        held_out: Share of documents to hold out.
        text_key: Field of a JSONL line that holds the text.
        max_bytes: Use no more text than this; which documents is decided by their hash.
        max_document_bytes: Leave out documents that are larger, and count them.
        document_multiple: End each document with as many EOS as make its length a multiple of this:
            2·CP lets packed documents be dealt over CP ranks.
        num_workers: Processes; as many as there are cores where the text is large, if not given.
        overwrite: Replace prepared data in ``out``.
        progress: Draw bars on standard error.

    Raises:
        UserError: Bad arguments, unreadable input, too little text, or an ``out`` that may not or
            cannot be written.
    """
    out = Path(out)
    _check_arguments(vocab_size, held_out, max_bytes)
    _check_numbers(max_document_bytes, document_multiple, num_workers)
    known = load_tokenizer(tokenizer) if tokenizer is not None else None
    if known is not None and vocab_size not in (None, known.vocab_size):
        raise UserError(
            f"Tokenizer {str(tokenizer)!r} has {known.vocab_size} tokens, not {vocab_size}; "
            "leave the vocabulary size out."
        )
    paths = list(paths)
    files = find_files(paths, exclude=out)
    request = {
        "files": _listing(files),
        "vocab_size": vocab_size,
        "tokenizer": known.fingerprint if known is not None else None,
        "held_out": held_out,
        "text_key": text_key,
        "max_bytes": max_bytes,
        "max_document_bytes": max_document_bytes,
        "document_multiple": document_multiple,
    }
    existing = reusable(out, request, overwrite)
    if existing is not None:
        clear_stage(out)
        return existing
    reading = Reading(text_key, max_document_bytes)
    shards = cut(files)
    count = usual_workers(shards) if num_workers is None else min(num_workers, len(shards))
    under_way = {**request, "shard_bytes": shards_module.SHARD_BYTES}
    with staging(out, under_way) as stage, bars(progress) as drawn:
        with _interrupt_told(stage), workers(count) as run:
            passes = _Passes(stage, shards, reading, run, drawn)
            plan, skipped = passes.plan(held_out, max_bytes)
            folder = stage.folder / "tokenizer"
            if not folder.exists():
                begun = stage.folder / ".tokenizer"
                if tokenizer is None:
                    _train(passes.sample(plan), plan, vocab_size, begun)
                else:
                    copy_tokenizer(Path(tokenizer), begun)
                begun.rename(folder)
            # Loaded from where it will be read, so the fingerprint is that of the written file.
            loaded = load_tokenizer(folder)
            counts = passes.encode(plan, folder, loaded.vocab_size, document_multiple)
        copy_tokenizer(folder, stage.whole / "tokenizer")
        data = PreparedData(
            root=out,
            vocab_size=loaded.vocab_size,
            eos_id=loaded.eos_id,
            tokenizer_fingerprint=loaded.fingerprint,
            splits={
                name: SplitCounts(
                    plan.documents[name], counts[name][0], plan.bytes[name], counts[name][1]
                )
                for name in SPLITS
            },
            skipped={name: skipped[name] for name in _SKIPPED},
            source={"paths": [str(Path(path).absolute()) for path in paths], "files": len(files)},
            request=request,
            document_multiple=document_multiple,
        )
        data.write_manifest(stage.whole)
    return PreparedData.open(out)


class _Passes:
    """The passes over the shards, each taking up what an interrupted one left."""

    def __init__(
        self, stage: Stage, shards: list[Shard], reading: Reading, run: Run, bars: Progress
    ):
        self.stage, self.shards, self.reading = stage, shards, reading
        self.run, self.bars = run, bars
        if stage.resumed:
            done = sum(part_folder(stage.parts, shard).exists() for shard in shards)
            print(f"Going on with an interrupted preparation: {done} of {len(shards)} shards done.")

    def _over(self, title: str, function: Any, shards: list[Shard]) -> Iterator[Any]:
        total = sum(shard.size for shard in self.shards)
        left = sum(shard.size for shard in shards)
        task = self.bars.add_task(title, total=total, completed=total - left)
        for shard, result in zip(shards, self.run(function, shards), strict=True):
            self.bars.advance(task, shard.size)
            yield result

    def plan(self, held_out: float, max_bytes: int | None) -> tuple[SplitPlan, Counter[str]]:
        """Return the split, and what was left out of it."""
        known = self.stage.read("plan.json")
        if known is None:
            surveyed = list(self._over("reading", self.reading.survey, self.shards))
            plan = plan_split(
                Places.joined([places for places, _ in surveyed]),
                held_out=held_out,
                max_bytes=max_bytes,
                tokenizer_bytes=TOKENIZER_BYTES,
            )
            skipped = sum((counts for _, counts in surveyed), Counter[str]())
            known = {"plan": asdict(plan), "skipped": dict(skipped)}
            self.stage.write("plan.json", known)
        return SplitPlan(**known["plan"]), Counter(known["skipped"])

    def sample(self, plan: SplitPlan) -> Iterator[str]:
        """Yield the texts to train a tokenizer on."""
        for texts in self._over(
            "training the tokenizer", Sampling(self.reading, plan), self.shards
        ):
            yield from texts

    def encode(
        self, plan: SplitPlan, tokenizer: Path, vocab_size: int, document_multiple: int
    ) -> dict[Any, tuple[int, int]]:
        """Encode what is not encoded yet, and join all of it; return tokens and padding."""
        dtype = token_dtype(vocab_size)
        parts = self.stage.parts
        encode = Encoding(self.reading, plan, tokenizer, dtype, document_multiple, parts)
        missing = [shard for shard in self.shards if not part_folder(parts, shard).exists()]
        for _ in self._over("encoding", encode, missing):
            pass
        return join_parts(parts, self.shards, dtype, self.stage.whole)


@contextmanager
def _interrupt_told(stage: Stage) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"Interrupted. Run the same command to resume (kept in {stage.folder}).")
        raise


def _check_arguments(vocab_size: int | None, held_out: float, max_bytes: int | None) -> None:
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    check_held_out(held_out)
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"The size cap is {max_bytes} bytes; it must be positive.")


def _check_numbers(max_document_bytes: int, document_multiple: int, workers: int | None) -> None:
    if not 0 < max_document_bytes <= MAX_DOCUMENT_BYTES:
        raise UserError(
            f"The largest document is set to {max_document_bytes:,} bytes; it must be positive and "
            f"at most {MAX_DOCUMENT_BYTES:,}, what Megatron's index can hold."
        )
    if document_multiple < 1:
        raise UserError(f"The document multiple is {document_multiple}; it must be at least 1.")
    if workers is not None and workers < 1:
        raise UserError(f"The number of workers is {workers}; it must be at least 1.")


def _listing(files: list[SourceFile]) -> str:
    """Return a digest of names, sizes and times: enough to see a change, as `make` does."""
    rows = sorted([file.key, file.size, file.mtime_ns] for file in files)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _train(texts: Iterator[str], plan: SplitPlan, vocab_size: int | None, folder: Path) -> None:
    trained = train_tokenizer(texts, vocab_size or DEFAULT_VOCAB_SIZE)
    reached = trained.get_vocab_size()
    if vocab_size is not None and reached != vocab_size:
        raise UserError(
            f"A vocabulary of {vocab_size} asks for more than this text yields: its "
            f"{plan.tokenizer_bytes:,} training bytes give {reached} tokens. "
            f"Ask for {reached} or fewer, or add text."
        )
    if reached < DEFAULT_VOCAB_SIZE and vocab_size is None:
        print(f"Vocabulary: {reached} tokens, all that this text yields.")
    if plan.tokenizer_bytes < plan.bytes["train"]:
        print(f"Tokenizer trained on {plan.tokenizer_bytes:,} of {plan.bytes['train']:,} bytes.")
    save_tokenizer(trained, folder)
