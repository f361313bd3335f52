"""Turn text into a folder that Megatron and NeMo train on.

Three passes over the text: count and split, train the BPE, encode. The folder appears at the end
under its name, whole; a failure leaves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.data.corpus import Document, SourceFile, find_files, iter_documents
from nemo_megacpp.data.prepared import PreparedData, SplitCounts, read_manifest
from nemo_megacpp.data.split import SPLITS, Split, SplitPlan, plan_split
from nemo_megacpp.data.tokenizer import (
    LoadedTokenizer,
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

_BATCH_BYTES = 1 << 22

Read = Callable[[str, "Counter[str]"], Iterator[Document]]
"""One pass over the documents, under a title, counting what is left out."""


def prepare(
    paths: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    held_out: float = 0.05,
    text_key: str = "text",
    max_bytes: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PreparedData:
    """Prepare text for pre-training: tokenizer, ``train`` and ``heldout`` in ``.bin/.idx``.

    A folder that an equal request made from unchanged files is checked and reused.

    Args:
        paths: Files and folders of text, JSONL, either also as ``.gz``.
        out: The folder to make.
        vocab_size: Vocabulary of the BPE to train; default `DEFAULT_VOCAB_SIZE`, or what a small
            corpus yields. Only the training documents are seen.
        tokenizer: A folder with a Hugging Face ``tokenizer.json`` to use instead.
        held_out: Share of documents to hold out.
        text_key: Field of a JSONL line that holds the text.
        max_bytes: Use no more text than this; which documents is decided by their hash.
        overwrite: Replace prepared data in ``out``.
        progress: Draw bars on standard error.

    Raises:
        UserError: Bad arguments, unreadable input, too little text, or an ``out`` that may not or
            cannot be written.
    """
    out = Path(out)
    _check_arguments(vocab_size, held_out, max_bytes)
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
    }
    existing = _existing(out, request, overwrite)
    if existing is not None:
        return existing
    source = {"paths": [str(Path(path).absolute()) for path in paths], "files": len(files)}

    with _publish(out) as folder, _bars(progress) as bars:

        def read(title: str, counts: Counter[str]) -> Iterator[Document]:
            task = bars.add_task(title, total=sum(file.size for file in files))
            return iter_documents(
                files,
                text_key=text_key,
                counts=counts,
                on_file=lambda file: bars.advance(task, file.size),
            )

        skipped = Counter({"empty": 0, "binary": 0, "bad_utf8": 0})
        plan = plan_split(
            read("reading", skipped),
            held_out=held_out,
            max_bytes=max_bytes,
            tokenizer_bytes=TOKENIZER_BYTES,
        )
        if tokenizer is None:
            _train(read, plan, vocab_size, folder / "tokenizer")
        else:
            copy_tokenizer(Path(tokenizer), folder / "tokenizer")
        # Loaded from where it will be read, so that the fingerprint is that of the written file.
        loaded = load_tokenizer(folder / "tokenizer")
        tokens = _encode(read("encoding", Counter()), plan, loaded, folder)
        data = PreparedData(
            root=out,
            vocab_size=loaded.vocab_size,
            eos_id=loaded.eos_id,
            tokenizer_fingerprint=loaded.fingerprint,
            splits={
                name: SplitCounts(plan.documents[name], tokens[name], plan.bytes[name])
                for name in SPLITS
            },
            skipped=dict(skipped),
            source=source,
            request=request,
        )
        data.write_manifest(folder)
    return PreparedData.open(out)


def _check_arguments(vocab_size: int | None, held_out: float, max_bytes: int | None) -> None:
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    if not 0 < held_out < 1:
        raise UserError(f"The held-out share is {held_out}; it must lie between 0 and 1.")
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"The size cap is {max_bytes} bytes; it must be positive.")


def _listing(files: list[SourceFile]) -> str:
    """Return a digest of names, sizes and times: enough to see a change, as `make` does."""
    rows = sorted([file.key, file.size, file.mtime_ns] for file in files)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _existing(out: Path, request: dict[str, Any], overwrite: bool) -> PreparedData | None:
    """Return reusable data in ``out``, None if ``out`` may be written, and refuse otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        read_manifest(out)
    except UserError as error:
        raise UserError(
            f"{str(out)!r} exists and is not prepared data, so it is left alone; name another "
            "folder."
        ) from error
    if overwrite:
        return None
    data = PreparedData.open(out)
    changed = [name for name, value in request.items() if data.request.get(name) != value]
    if changed:
        details = ", ".join(
            "the source files"
            if name == "files"
            else f"{name} {data.request.get(name)} (now {request[name]})"
            for name in changed
        )
        raise UserError(
            f"{str(out)!r} holds data prepared otherwise; different: {details}. "
            "Name another folder, or replace it with --overwrite."
        )
    print(f"Reusing {out}: {data.tokens:,} tokens prepared earlier from the same files.")
    return data


def _train(read: Read, plan: SplitPlan, vocab_size: int | None, folder: Path) -> None:
    texts = (
        document.text
        for document in read("training the tokenizer", Counter())
        if plan.trains_tokenizer(document.key)
    )
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


def _encode(
    documents: Iterable[Document], plan: SplitPlan, loaded: LoadedTokenizer, folder: Path
) -> dict[Split, int]:
    """Write both splits with Megatron's builder and return their tokens, EOS included."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(loaded.vocab_size)
    builders = {
        name: IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype) for name in SPLITS
    }
    tokens: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for batch in _batches(documents, plan):
        encodings = loaded.tokenizer.encode_batch_fast(
            [document.text for _, document in batch], add_special_tokens=False
        )
        for (name, _), encoding in zip(batch, encodings, strict=True):
            ids = [*encoding.ids, loaded.eos_id]
            builders[name].add_item(torch.tensor(ids))
            builders[name].end_document()
            tokens[name] += len(ids)
    for name, builder in builders.items():
        builder.finalize(str(folder / f"{name}.idx"))
    return tokens


def _batches(
    documents: Iterable[Document], plan: SplitPlan
) -> Iterator[list[tuple[Split, Document]]]:
    """Group documents so that tokenizers can use all cores on bounded memory."""
    batch: list[tuple[Split, Document]] = []
    size = 0
    for document in documents:
        name = plan.split(document.key)
        if name is None:
            continue
        batch.append((name, document))
        size += document.size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _publish(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` that takes its name if all goes well, and vanishes if not."""
    out = out.resolve()  # a link to a folder keeps pointing at it
    parents = [folder for folder in out.parents if not folder.exists()]
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    replaced = out.parent / f".{out.name}.replaced-{os.getpid()}"
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
            if out.exists():
                out.rename(replaced)
            partial.rename(out)
        except OSError as error:
            raise UserError(f"Cannot write {str(out)!r}: {error.strerror or error}.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        for folder in parents:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _bars(shown: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield progress
