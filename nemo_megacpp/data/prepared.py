"""A folder of prepared data: what it holds, and whether it is whole.

::

    data.json               what was made, from what, with which tokenizer
    tokenizer/              Hugging Face files
    train.bin, train.idx    Megatron's indexed dataset; likewise heldout
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_megacpp.data.indexed import IndexedTokens
from nemo_megacpp.data.split import SPLITS, Split
from nemo_megacpp.data.tokenizer import fingerprint
from nemo_megacpp.errors import UserError

MANIFEST = "data.json"
FORMAT = "nemo_megacpp.data"
VERSION = 1
COMMAND = "nemo-megacpp data prepare PATH… --out DIR"
ADOPT = "nemo-megacpp data adopt PREFIX --tokenizer DIR --out DIR"


@dataclass(frozen=True)
class SplitCounts:
    """Size of one split.

    Attributes:
        documents: how many.
        tokens: of all documents, with EOS and padding.
        bytes: of the text in UTF-8; None where the text was not seen.
        padding: EOS tokens beyond the one that ends each document.
    """

    documents: int
    tokens: int
    bytes: int | None
    padding: int = 0


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, as its manifest describes it."""

    root: Path
    vocab_size: int
    eos_id: int
    tokenizer_fingerprint: str
    splits: dict[Split, SplitCounts]
    skipped: dict[str, int]
    """Files and lines left out (``empty``, ``binary``) or kept with replacements (``bad_utf8``);
    documents left out for their size (``huge``)."""
    source: dict[str, Any]
    """Where the text came from, for people."""
    request: dict[str, Any]
    """What was asked for; the same request reuses the folder."""
    document_multiple: int = 1
    """Every document, with its EOS and further ones after it, has a multiple of this of tokens."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> PreparedData:
        """Open a folder and check it: manifest, files, sizes, tokenizer.

        Raises:
            UserError: The folder is missing, is not prepared data, or is damaged.
        """
        root = Path(folder)
        data = cls._from_manifest(root, read_manifest(root))
        try:
            for state in data.request.get("adopted", []):
                if file_state(Path(state[0])) != state:
                    raise UserError(f"{state[0]} was changed since it was adopted.")
            for name in SPLITS:
                found, said = IndexedTokens.open(root / name), data.splits[name]
                if (len(found.lengths), found.tokens) != (said.documents, said.tokens):
                    raise UserError(
                        f"{root / name}.idx holds {len(found.lengths):,} documents and "
                        f"{found.tokens:,} tokens; {MANIFEST} says {said.documents:,} and "
                        f"{said.tokens:,}."
                    )
            data.check_tokenizer(data.tokenizer_dir)
        except UserError as error:
            again = ADOPT if "adopted" in data.request else COMMAND
            raise UserError(
                f"Prepared data in {str(root)!r} is damaged. {error} "
                f"Make it again: {again} --overwrite"
            ) from error
        return data

    @classmethod
    def _from_manifest(cls, root: Path, manifest: dict[str, Any]) -> PreparedData:
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{root / MANIFEST} has format version {manifest.get('version')}; this release "
                f"reads version {VERSION}. Make it again: {COMMAND} --overwrite"
            )
        try:
            return cls(
                root=root,
                vocab_size=manifest["vocab_size"],
                eos_id=manifest["eos_id"],
                tokenizer_fingerprint=manifest["tokenizer_fingerprint"],
                splits={name: SplitCounts(**manifest["splits"][name]) for name in SPLITS},
                skipped=manifest["skipped"],
                source=manifest["source"],
                request=manifest["request"],
                document_multiple=manifest.get("document_multiple", 1),
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{root / MANIFEST} is damaged ({error}). Make it again: {COMMAND} --overwrite"
            ) from error

    def write_manifest(self, folder: Path) -> None:
        """Write ``data.json`` into ``folder``, which may still be on its way to ``root``."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del content["root"]
        text = json.dumps(content, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    def check_tokenizer(self, other: str | os.PathLike[str]) -> None:
        """Refuse a tokenizer other than the one that made the data.

        Args:
            other: A fingerprint, or a tokenizer folder.

        Raises:
            UserError: The tokenizers differ, or the folder has none.
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

    @property
    def train_prefix(self) -> str:
        """Megatron's data prefix (the path without ``.bin``), absolute."""
        return str((self.root / "train").absolute())

    @property
    def heldout_prefix(self) -> str:
        """Megatron's data prefix (the path without ``.bin``), absolute."""
        return str((self.root / "heldout").absolute())

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer, for transformers and NeMo's ``AutoTokenizer``."""
        return self.root / "tokenizer"

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return self.splits["train"].tokens


def file_state(path: Path) -> list[Any] | None:
    """Return what shows that a file was changed, as `make` sees it; None if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [str(path), stat.st_size, stat.st_mtime_ns]


def read_manifest(root: Path) -> dict[str, Any]:
    """Read ``data.json``, whatever its version.

    Raises:
        UserError: The folder is missing or is not prepared data.
    """
    if not root.is_dir():
        if Path(f"{root}.idx").exists():
            raise UserError(
                f"{str(root)!r} are files of Megatron's preprocess_data.py. Take them as they are, "
                f"once: {ADOPT.replace('PREFIX', str(root))}; then data=DIR."
            )
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"Prepared data {str(root)!r} {what}. Make it: {COMMAND}")
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{str(root)!r} is not prepared data: it has no {MANIFEST}. Make it: {COMMAND}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read {str(path)!r}: {error}. Make it again: {COMMAND} --overwrite"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} does not describe prepared data. Make it: {COMMAND}")
    return manifest


def reusable(out: Path, request: dict[str, Any], overwrite: bool) -> PreparedData | None:
    """Return data in ``out`` that an equal request made; None if ``out`` may be written.

    Raises:
        UserError: ``out`` holds something else, or what another request made.
    """
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
            if name in ("files", "adopted")
            else f"{name} {data.request.get(name)} (now {request[name]})"
            for name in changed
        )
        raise UserError(
            f"{str(out)!r} holds data prepared otherwise; different: {details}. "
            "Name another folder, or replace it with --overwrite."
        )
    print(f"Reusing {out}: {data.tokens:,} tokens prepared earlier from the same files.")
    return data
