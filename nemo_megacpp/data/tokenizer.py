"""Byte-level BPE tokenizers in Hugging Face's format: train, save, load, compare.

A folder holds ``tokenizer.json`` and ``tokenizer_config.json``, so that transformers, and with it
NeMo's ``AutoTokenizer``, load it offline and add no token: the vocabulary stays as trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_megacpp.errors import UserError
from nemo_megacpp.json_files import read_json

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

EOS_TOKEN = "<|endoftext|>"
# Megatron masks the loss at padding. Padding needs an id of its own: one shared with EOS is ignored
# with a warning, and without one a last, partial validation sequence cannot be padded.
PAD_TOKEN = "<|padding|>"
SPECIAL_TOKENS = [EOS_TOKEN, PAD_TOKEN]
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_FAMILY = (_FILE, _CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

_LIMIT = 256 << 20
"""Most bytes of a tokenizer's file; the largest in use have about 35 MB."""
_SECONDS = 60
"""Longest time in which a tokenizer may load and encode a few words; usual is under one."""
_BYTES_PER_SECOND = 20_000
"""Slowest encoding that is waited for, after `_SECONDS`; usual are a million."""
_TRIAL = """
import sys
try:
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(sys.argv[1])
    words = ["Some words, 1234.", " " * 40, "a" * 40 + "c", "\\n\\t é 世界", ""]
    tokenizer.encode_batch_fast(words, add_special_tokens=False)
    print("whole")
except BaseException as error:
    print(" ".join(str(error).split())[:300])
"""

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer that neither truncates nor pads nor makes special tokens from text."""

    tokenizer: Tokenizer
    vocab_size: int
    eos_id: int
    fingerprint: str
    folder: Path

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text.

        Raises:
            UserError: the library fails, or a pattern of the tokenizer takes for ever on a text.
        """
        return [encoding.ids for encoding in self._encode(texts, "encode_batch_fast")]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of every text, and the first character of each; raises as `encode`."""
        return [
            (encoding.ids, [first for first, _ in encoding.offsets])
            for encoding in self._encode(texts, "encode_batch")
        ]

    def bytes_of_tokens(self) -> list[int] | None:
        """Return how many bytes of text each token stands for, ``[vocab_size]``; a special token
        for none. None where the tokenizer is not a byte-level one, whose tokens spell their bytes.

        Raises:
            UserError: its file cannot be read.
        """
        content = _read_json(self.folder / _FILE)
        if '"ByteLevel"' not in json.dumps(content.get("decoder")):
            return None
        added = self.tokenizer.get_added_tokens_decoder()
        return [
            (0 if added[number].special else len(added[number].content.encode()))
            if number in added
            else len(self.tokenizer.id_to_token(number))  # a character for each byte
            for number in range(self.vocab_size)
        ]

    def _encode(self, texts: Sequence[str], method: str) -> list[Encoding]:
        seconds = _SECONDS + sum(map(len, texts)) // _BYTES_PER_SECOND
        with guard_library(self.folder):
            try:
                return _in_thread(
                    lambda: getattr(self.tokenizer, method)(texts, add_special_tokens=False),
                    seconds,
                )
            except TimeoutError:
                raise UserError(
                    f"{self.folder / _FILE} cannot be used as a tokenizer: it has not encoded "
                    f"{sum(map(len, texts)):,} characters within {seconds:,} s."
                ) from None


def _in_thread(function: Callable[[], T], seconds: float | None = None) -> T:
    """Call a function of the library, which answers Ctrl-C only when it has finished.

    The main thread is free for it meanwhile.

    Raises:
        TimeoutError: it has not finished after ``seconds``; its thread goes on.
    """
    done: Future[T] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return done.result(seconds)


def check_vocab_size(vocab_size: int) -> None:
    """Raise a UserError for a vocabulary that cannot hold every byte and the special tokens."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"A vocabulary of {vocab_size} is too small: a byte-level BPE needs at least "
            f"{MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)."
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer); the same texts give the same tokenizer.

    Its vocabulary is smaller than ``vocab_size`` if the text has too few pairs.

    Raises:
        UserError: ``vocab_size`` is below `MIN_VOCAB_SIZE`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _in_thread(lambda: tokenizer.train_from_iterator(texts, trainer))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer made by `train_tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    # The library's own save() raises a bare Exception on a full disk.
    (folder / _FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_config(folder, {"eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN})


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, and no others in its folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _FAMILY:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / _CONFIG).exists():
        _write_config(target, {"eos_token": EOS_TOKEN})


def load_tokenizer(folder: str | os.PathLike[str], tried: bool = False) -> LoadedTokenizer:
    """Load a tokenizer folder.

    Args:
        folder: of ``tokenizer.json``.
        tried: this process or its parent has loaded it before, so that it need not be tried in a
            process of its own, which takes 0.3 s.

    Raises:
        UserError: ``tokenizer.json`` is missing or unreadable, no token ends a document, or the
            ids have holes.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    identity = fingerprint(folder)
    if not tried:
        _try_in_child(folder)
    with guard_library(folder):
        tokenizer = Tokenizer.from_file(str(folder / _FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Text that spells a special token must not become one: it would end a document in its middle.
    tokenizer.encode_special_tokens = True

    eos_token = _eos_token(folder)
    eos_id = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise UserError(
            f"{folder} has no end-of-document token {eos_token!r} in its vocabulary; name one as "
            f"'eos_token' in {_CONFIG}."
        )
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    vocab_size = len(ids)
    if max(ids) != vocab_size - 1:
        raise UserError(
            f"{folder / _FILE} has {vocab_size} tokens but ids up to {max(ids)}: a model "
            "built from the count would lack embeddings."
        )
    return LoadedTokenizer(tokenizer, vocab_size, eos_id, identity, folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the file that :func:`load_tokenizer` reads."""
    return (folder / _FILE).is_file()


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Return the SHA-256, in hex, of what determines a tokenizer's ids.

    That is ``tokenizer.json`` in canonical JSON, without truncation and padding, which libraries
    change when they save a tokenizer again.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    content = _read_json(Path(folder) / _FILE)
    for passing in ("truncation", "padding"):
        content.pop(passing, None)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _eos_token(folder: Path) -> str:
    config = _read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    token = config.get("eos_token") or EOS_TOKEN
    # transformers writes a token as a string or, with its flags, as an object.
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        raise UserError(f"{folder / _CONFIG} is damaged: eos_token should be a string.")
    return token


def _write_config(folder: Path, special: dict[str, str]) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # transformers would otherwise drop spaces before punctuation when decoding.
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    from pydantic import TypeAdapter

    if not path.exists():
        raise UserError(f"No tokenizer in {str(path.parent)!r}: {path.name} is missing.")
    return read_json(path, TypeAdapter(dict[str, Any]), _LIMIT)


@contextmanager
def guard_library(folder: Path) -> Iterator[None]:
    """Turn what the tokenizers library raises into a UserError, its panics included.

    A panic of the Rust library derives from BaseException alone, and its class cannot be imported.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError, OSError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder / _FILE} cannot be used as a tokenizer: {reason}.") from error


def _try_in_child(folder: Path) -> None:
    """Load a tokenizer and encode a little text in a process of its own.

    A hostile file may take for ever, or end its process; a child can be ended and is silent.

    Raises:
        UserError: it did not load within `_SECONDS`.
    """
    command = [sys.executable, "-c", _TRIAL, str(folder / _FILE)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
        reason = done.stdout.decode(errors="replace").strip() or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"it does not load and encode a few words within {_SECONDS} s"
    if reason != "whole":
        raise UserError(f"{folder / _FILE} is not a tokenizer: {reason.rstrip('.')[:300]}.")
