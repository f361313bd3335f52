"""Byte-level BPE tokenizers in Hugging Face's format: train, save, load, compare.

A folder holds ``tokenizer.json`` and ``tokenizer_config.json``, so that transformers, and with it
NeMo's ``AutoTokenizer``, load it offline and add no token: the vocabulary stays as trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_megacpp.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS_TOKEN = "<|endoftext|>"
# Megatron masks the loss at padding. Padding needs an id of its own: one shared with EOS is ignored
# with a warning, and without one a last, partial validation sequence cannot be padded.
PAD_TOKEN = "<|padding|>"
SPECIAL_TOKENS = [EOS_TOKEN, PAD_TOKEN]
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_FAMILY = (_FILE, _CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer that neither truncates nor pads nor makes special tokens from text."""

    tokenizer: Tokenizer
    vocab_size: int
    eos_id: int
    fingerprint: str


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
    done: Future[None] = Future()

    def train() -> None:
        try:
            done.set_result(tokenizer.train_from_iterator(texts, trainer))
        except BaseException as error:
            done.set_exception(error)

    # The library answers Ctrl-C only when it has finished, so the main thread must be free for it.
    threading.Thread(target=train, daemon=True).start()
    done.result()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer made by `train_tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / _FILE))
    _write_config(folder, {"eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN})


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, and no others in its folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _FAMILY:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / _CONFIG).exists():
        _write_config(target, {"eos_token": EOS_TOKEN})


def load_tokenizer(folder: str | os.PathLike[str]) -> LoadedTokenizer:
    """Load a tokenizer folder.

    Raises:
        UserError: ``tokenizer.json`` is missing or unreadable, no token ends a document, or the
            ids have holes.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    identity = fingerprint(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / _FILE))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{folder / _FILE} is not a tokenizer: {error}.") from error
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
    return LoadedTokenizer(tokenizer, vocab_size, eos_id, identity)


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
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _write_config(folder: Path, special: dict[str, str]) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # transformers would otherwise drop spaces before punctuation when decoding.
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"No tokenizer in {str(path.parent)!r}: {path.name} is missing.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {str(path)!r}: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return content
