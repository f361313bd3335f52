"""The commands of the documentation, with their output: read, run, and written again.

A ``console`` block holds commands after ``$`` and what they print. Numbers vary from run to run and
are compared by their form; ``…`` stands for anything, and as a line for any lines. Progress bars
are left out. To write the outputs anew::

    python -m tests.docs.commands docs/verify.md

Blocks in ``sh`` are for other machines (a cluster, a container) and are not run.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _pages() -> list[Path]:
    """Return the pages in the order of the navigation: a later one may use what an earlier made."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    names = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    return [*(ROOT / "docs" / name for name in names), ROOT / "README.md"]


PAGES = _pages()

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
_BAR = re.compile(r"[━╸╺]{3,}.*\d+:\d\d:\d\d")
_LONGEST = 40

_ENVIRONMENT = {
    "COLUMNS": "100",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "XDG_CACHE_HOME": str(ROOT / "data"),  # the built-in corpus is prepared once for all
}
_ONLY_PRINTS = re.compile(
    r"nemo-megacpp (recipes|plan|layouts|compare|settings|report|doctor"
    r"|megatron-args|checkpoint (inspect|verify)|data (inspect|verify|adopt))( |$)"
)
_PRELOADED = (
    "nemo_megacpp.contract.plan_page",
    "nemo_megacpp.contract.layout_search",
    "nemo_megacpp.runs.comparison",
    "nemo_megacpp.runs.run_page",
    "nemo_megacpp.preflight",
    "nemo_megacpp.checkpoint.content",
)


@dataclass
class Command:
    """One command of a page and the lines that the page shows for it."""

    text: str
    shown: list[str] = field(default_factory=list)


def blocks(text: str) -> list[list[Command]]:
    """Return the commands of every console block of a page."""
    return [_commands(match[1]) for match in _BLOCK.finditer(text)]


def _commands(block: str) -> list[Command]:
    found: list[Command] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        else:
            assert found, f"output before a command: {line!r}"
            found[-1].shown.append(line)
    return found


def run(command: str, folder: Path) -> list[str]:
    """Run a command as a reader would, in ``folder``, and return the lines that it prints."""
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        **_ENVIRONMENT,
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return _lines(done.stdout, folder)


def run_preloaded(command: str, folder: Path) -> list[str]:
    """Run a command that starts no ranks in a fork of a process that has imported the libraries.

    Their import takes most of such a command's time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with tempfile.NamedTemporaryFile("r+", encoding="utf-8") as output:
        process = context.Process(target=_call_main, args=(command, str(folder), output.name))
        process.start()
        process.join()
        return _lines(output.read(), folder)


def starts_no_ranks(command: Command) -> bool:
    """Whether a page shows this command refused, or it is one of those that only print."""
    words = list(shlex.shlex(command.text, posix=True, punctuation_chars=True))
    if any(word[0] in "|$<>&" for word in words):  # not inside quotes
        return False
    refused = any(line.startswith("nemo-megacpp: ") for line in command.shown)
    return refused or _ONLY_PRINTS.match(command.text) is not None


def _call_main(command: str, folder: str, output: str) -> None:
    os.chdir(folder)
    os.environ.update(_ENVIRONMENT)
    stream = os.open(output, os.O_WRONLY)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    _, *sys.argv[1:] = shlex.split(command)
    from nemo_megacpp.cli import main

    main()


def _lines(printed: str, folder: Path) -> list[str]:
    lines = printed.replace(str(folder), "…").strip("\n").splitlines()
    return [line.rstrip() for line in lines if not _BAR.search(line)]


def missing(shown: list[str], printed: list[str]) -> list[str]:
    """Return the shown lines that were not printed, in their order, up to numbers and ``…``."""
    forms = [_form(line) for line in printed]
    lost, position = [], 0
    for line in shown:
        if line.strip() in ("…", ""):
            continue
        wanted = re.compile(".*".join(map(re.escape, _form(line).split("…"))))
        for index in range(position, len(forms)):
            if wanted.fullmatch(forms[index]):
                position = index + 1
                break
        else:
            lost.append(line)
    return lost


def _form(line: str) -> str:
    # The width of a number changes the spaces around it, in tables too.
    line = re.sub(r"(\d+ (h|min) )+\d+ (min|s)\b", "0 s", line)  # a duration of any length
    return re.sub(r"[\s─━]+", " ", _NUMBER.sub("#", line)).strip()


def refresh(page: Path, folder: Path) -> None:
    """Run the page's commands and write what they print into it."""

    def renew(match: re.Match[str]) -> str:
        lines = []
        for command in _commands(match[1]):
            printed = run(command.text, folder)
            if len(printed) > _LONGEST:
                half = _LONGEST // 2
                printed = [*printed[:half], "…", *printed[-half:]]
            lines += [f"$ {command.text}", *printed]
        return "```console\n" + "\n".join(lines) + "\n```"

    page.write_text(_BLOCK.sub(renew, page.read_text(encoding="utf-8")), encoding="utf-8")


def workplace(folder: Path) -> Path:
    """Make ``folder`` look like a checkout in which a reader types."""
    for name in ("examples", "README.md"):
        link = folder / name
        if not link.exists():
            link.symlink_to(ROOT / name)
    return folder


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:]:
            refresh(Path(name), workplace(Path(scratch)))
