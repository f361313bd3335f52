"""A folder of prepared data: what it holds, and whether it is complete.

::

    data.json               what was made, from what, with which tokenizer
    checksums.json          of every file, in blocks; written last
    tokenizer/              Hugging Face files
    train.bin, train.idx    Megatron's indexed dataset; likewise heldout
    train.NAME.bin, .idx    ids of a side channel, beside the tokens; likewise heldout
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le, MaxLen
from pydantic import Field, StringConstraints, TypeAdapter
from pydantic.dataclasses import dataclass

from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.split import SPLITS, Split
from nemo_megacpp.data.tokenizer import fingerprint
from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import Count, Text, parse_json, read_limited
from nemo_megacpp.printable import say
from nemo_megacpp.side_channels import SideChannel

CHECKSUMS = "checksums.json"
MANIFEST = "data.json"
FORMAT = "nemo_megacpp.data"
VERSION = 2
_LIMIT = 16 << 20
"""Most bytes of a manifest."""
COMMAND = "nemo-megacpp data prepare PATH… --out DIR"
ADOPT = "nemo-megacpp data adopt PREFIX --tokenizer DIR --out DIR"

_Positive = Annotated[int, Ge(1), Le(2**53)]
_Nanoseconds = Annotated[int, Ge(-(2**63)), Le(2**63)]
FileState = tuple[Text, Count, _Nanoseconds]
"""Path, size and time of a file, which `make` compares too."""
_Adopted = Annotated[list[FileState], MaxLen(len(SPLITS))]
Request = dict[Text, str | int | float | bool | _Adopted | None]
"""The arguments of a preparation or an adoption."""


@dataclass(frozen=True)
class SplitCounts:
    """Size of one split.

    Attributes:
        documents: number of them.
        tokens: of all documents, with EOS and padding.
        bytes: of the text in UTF-8; None for adopted data, whose text is not known.
        padding: EOS tokens beyond the one that ends each document.
    """

    documents: _Positive
    tokens: _Positive
    bytes: Count | None
    padding: Count = 0


@dataclass(frozen=True)
class PreparedChannel:
    """A side channel that was written: its ids are below ``vocab_size``, made from ``source``
    (:attr:`nemo_megacpp.side_channels.SideChannel.source`)."""

    name: Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]{0,39}$")]
    vocab_size: Annotated[int, Ge(1), Le(2**26)]
    source: Text


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, as its ``data.json`` describes it.

    Attributes:
        root: the folder.
        skipped: files and lines that were left out or repaired, by the kinds of
            `nemo_megacpp.data.corpus.Tally`.
        skipped_names: the first of each kind.
        source: where the text came from, for people.
        request: the arguments; an equal request reuses the folder.
        document_multiple: every document, with its EOS and padding, has a multiple of this of
            tokens.
    """

    vocab_size: Annotated[int, Ge(1), Le(2**31)]
    eos_id: Count
    tokenizer_fingerprint: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    splits: Annotated[dict[Split, SplitCounts], Field(min_length=len(SPLITS))]
    skipped: dict[Text, Count]
    source: dict[Text, Any]
    request: Request
    document_multiple: _Positive = 1
    skipped_names: dict[Text, list[Text]] = Field(default_factory=dict)
    side_channels: list[PreparedChannel] = Field(default_factory=list)
    root: Path = Path()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> PreparedData:
        """Open a folder and check it: manifest, files, sizes, tokenizer.

        Raises:
            UserError: the folder is missing, is not prepared data, or is damaged.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{root / MANIFEST} has format version {str(manifest.get('version'))[:20]}; this "
                f"release reads version {VERSION}. Make it again: {COMMAND} --overwrite"
            )
        try:
            content = read_limited(root / MANIFEST, _LIMIT)
            read = parse_json(content, TypeAdapter(cls), root / MANIFEST)
        except UserError as error:
            raise UserError(f"{error} Make it again: {COMMAND} --overwrite") from error
        data = dataclasses.replace(read, root=root)
        try:
            if not (root / CHECKSUMS).is_file():
                raise UserError(f"{CHECKSUMS} is missing.")
            for state in data.adopted:
                if file_state(Path(state[0])) != state:
                    raise UserError(f"{state[0]} was changed since it was adopted.")
            for split in SPLITS:
                found, said = IndexedTokens.open(root / split), data.splits[split]
                if (len(found.lengths), found.tokens) != (said.documents, said.tokens):
                    raise UserError(
                        f"{root / split}.idx holds {len(found.lengths):,} documents and "
                        f"{found.tokens:,} tokens; {MANIFEST} says {said.documents:,} and "
                        f"{said.tokens:,}."
                    )
                for channel in data.side_channels:
                    beside = IndexedTokens.open(root / f"{split}.{channel.name}")
                    if not np.array_equal(beside.lengths, found.lengths):
                        raise UserError(
                            f"{root / split}.{channel.name}.idx has other documents than "
                            f"{split}.idx."
                        )
            data.validate_tokenizer(data.tokenizer_dir)
        except UserError as error:
            raise data.damaged(str(error)) from error
        return data

    def damaged(self, what: str) -> UserError:
        """Return the error that names the folder, what is damaged, and the command to repeat."""
        again = ADOPT if self.adopted else COMMAND
        return UserError(
            f"Prepared data in {str(self.root)!r} is damaged. {what} "
            f"Make it again: {again} --overwrite"
        )

    def write_manifest(self, folder: Path) -> None:
        """Write ``data.json`` into ``folder``, which may have another name until it is complete."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del content["root"]
        text = json.dumps(content, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    def validate_tokenizer(self, other: str | os.PathLike[str]) -> None:
        """Raise a UserError for another tokenizer than the one that made the data.

        Args:
            other: a fingerprint, or the folder of a tokenizer.
        """
        is_fingerprint = isinstance(other, str) and re.fullmatch("[0-9a-f]{64}", other)
        identity = str(other) if is_fingerprint else fingerprint(other)
        if identity != self.tokenizer_fingerprint:
            named = "of the given fingerprint" if is_fingerprint else f"in {str(other)!r}"
            raise UserError(
                f"The data in {str(self.root)!r} was made with another tokenizer than the one "
                f"{named}: {self.tokenizer_fingerprint[:12]}… made it, this is {identity[:12]}…. "
                f"Use {str(self.tokenizer_dir)!r}, or make the data again with --tokenizer DIR."
            )

    def validate_side_channels(self, declared: Sequence[SideChannel]) -> None:
        """Raise a UserError for a model with a side channel that these data lack or made otherwise.

        Channels that the model does not declare are not read.
        """
        known = {channel.name: channel for channel in self.side_channels}
        for channel in declared:
            found = known.get(channel.name)
            wanted = f"{channel.source} and vocab_size={channel.vocab_size}"
            if found is None:
                raise UserError(
                    f"{self.root} has no side channel {channel.name}; it has "
                    f"{', '.join(known) or 'none'}. Prepare it with --side-channel "
                    f"name={channel.name},vocab_size={channel.vocab_size},{channel.source}"
                )
            if (found.source, found.vocab_size) != (channel.source, channel.vocab_size):
                raise UserError(
                    f"Side channel {channel.name} of {self.root} was made with {found.source} and "
                    f"vocab_size={found.vocab_size}, and the model declares {wanted}."
                )

    def validate_samples(self, vocab_size: int, seq_length: int) -> None:
        """Raise a UserError for a model of another vocabulary, or less than one sample a split."""
        if self.vocab_size != vocab_size:
            raise UserError(
                f"{self.root} was made with a vocabulary of {self.vocab_size}, but vocab_size="
                f"{vocab_size}. Leave vocab_size out to use the data's, or prepare the data with "
                f"--vocab-size {vocab_size}."
            )
        for split, counts in self.splits.items():
            if counts.tokens <= seq_length:
                raise UserError(
                    f"The {split} split of {self.root} has {counts.tokens} tokens; one sample of "
                    f"seq_length={seq_length} needs {seq_length + 1}."
                )

    @property
    def adopted(self) -> list[FileState]:
        """Files of others that hold the tokens, as they were when they were adopted."""
        files = self.request.get("adopted")
        return files if isinstance(files, list) else []

    @property
    def train_prefix(self) -> str:
        """Megatron's data prefix, absolute: the path without ``.bin``."""
        return str((self.root / "train").absolute())

    @property
    def heldout_prefix(self) -> str:
        """Megatron's data prefix, absolute."""
        return str((self.root / "heldout").absolute())

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer, for transformers and NeMo's ``AutoTokenizer``."""
        return self.root / "tokenizer"

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return self.splits["train"].tokens


def open_blend(blend: dict[str, float | None]) -> list[PreparedData]:
    """Open every folder of a blend.

    Raises:
        UserError: data that is missing or damaged, or made with another tokenizer than the first.
    """
    first, *others = opened = [PreparedData.open(Path(folder)) for folder in blend]
    for data in others:
        if data.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(
                f"{data.root} and {first.root} were made with different tokenizers, so their "
                f"token ids differ in meaning. Make one with the other's: nemo-megacpp data "
                f"prepare PATH… --out DIR --tokenizer {first.tokenizer_dir}"
            )
    return opened


def weighted_prefixes(prefixes: list[str], weights: Iterable[float | None]) -> list[str]:
    """Return prefixes as Megatron and NeMo take them: each after its weight, if they have any."""
    pairs = zip(weights, prefixes, strict=True)
    return [str(item) for pair in pairs for item in pair if item is not None]


def file_state(path: Path) -> FileState:
    """Return the state of a file.

    Raises:
        UserError: it is missing.
    """
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:  # a name with a NUL byte
        raise UserError(f"{path} cannot be read: {error}.") from error
    return str(path), stat.st_size, stat.st_mtime_ns


def read_manifest(root: Path) -> dict[str, Any]:
    """Read ``data.json`` of any version.

    Raises:
        UserError: the folder is missing or is not prepared data.
    """
    if not root.is_dir():
        if Path(f"{root}.idx").exists():
            raise UserError(
                f"{str(root)!r} are files of Megatron's preprocess_data.py. Adopt them without a "
                f"copy: {ADOPT.replace('PREFIX', str(root))}; then data=DIR."
            )
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"Prepared data {str(root)!r} {what}. Make it: {COMMAND}")
    path = root / MANIFEST
    if not path.exists():
        raise UserError(
            f"{str(root)!r} is not prepared data: it has no {MANIFEST}. Make it: {COMMAND}"
        )
    try:
        manifest = parse_json(read_limited(path, _LIMIT), TypeAdapter(dict[str, Any]), path)
    except UserError as error:
        raise UserError(f"{error} Make it again: {COMMAND} --overwrite") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} does not describe prepared data. Make it: {COMMAND}")
    return manifest


def reusable(out: Path, request: Request, overwrite: bool) -> PreparedData | None:
    """Return data in ``out`` that an equal request made; None if ``out`` may be written.

    Raises:
        UserError: ``out`` holds something else, or data of another request.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        read_manifest(out)
    except UserError as error:
        raise UserError(
            f"{str(out)!r} exists and is not prepared data, so it is not replaced; name another "
            "folder."
        ) from error
    if overwrite:
        return None
    data = PreparedData.open(out)
    # An argument of a later release is missing in older data, and then has its default.
    changed = [
        name
        for name in {**request, **data.request}
        if (data.request.get(name) or None) != (request.get(name) or None)
    ]
    if changed:
        details = ", ".join(
            "the source files"
            if name in ("files", "adopted")
            else f"{name} {data.request.get(name)} (now {request.get(name)})"
            for name in changed
        )
        raise UserError(
            f"{str(out)!r} holds data of another request; different: {details}. "
            "Name another folder, or replace it with --overwrite."
        )
    say(f"Reusing {out}: {data.tokens:,} tokens prepared earlier from the same files.")
    return data
