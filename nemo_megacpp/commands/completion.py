"""``nemo-megacpp completion``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

_EPILOG = """\
bash: eval "$(nemo-megacpp completion bash)" in ~/.bashrc
zsh:  eval "$(nemo-megacpp completion zsh)" in ~/.zshrc, after compinit"""
_BASH = """\
_nemo_megacpp() {{
    local offered current="${{COMP_WORDS[COMP_CWORD]}}"
    if [[ $COMP_CWORD -eq 1 ]]; then offered=({commands}); else case "${{COMP_WORDS[1]}}" in
{cases}
    esac; fi
    COMPREPLY=($(compgen -W "${{offered[*]}}" -- "$current"))
    if [[ ${{COMPREPLY[0]}} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}}
complete -o default -F _nemo_megacpp nemo-megacpp"""
_ZSH = """\
_nemo_megacpp() {{
    local -a offered
    if (( CURRENT == 2 )); then offered=({commands}); else case "$words[2]" in
{cases}
    esac; fi
    compadd -- ${{offered:#*=}}
    compadd -S '' -- ${{(M)offered:#*=}}
    _files
}}
compdef _nemo_megacpp nemo-megacpp"""


def add_parser(commands: Any) -> None:
    """Add ``completion`` to the command line's parsers."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands, recipes and settings in a shell",
        description="Print a shell script that completes commands, options, recipes and settings.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=partial(_run, commands.choices))


def _run(commands: dict[str, argparse.ArgumentParser], args: argparse.Namespace) -> int:
    cases = (f"    {name}) offered=({' '.join(_words(commands[name]))}) ;;" for name in commands)
    script = _BASH if args.shell == "bash" else _ZSH
    print(script.format(commands=" ".join(commands), cases="\n".join(cases)))
    return 0


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield what may follow a command: options, choices, recipes and settings."""
    from nemo_megacpp.layout.parallel import FIELD_OF
    from nemo_megacpp.recipes.catalog import CATALOG
    from nemo_megacpp.recipes.names import ALIASES, field_owners

    for action in parser._actions:
        yield from action.option_strings
        yield from map(str, action.choices or ())
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                yield from _words(nested)
        if action.dest in ("recipe", "a", "b"):
            yield from CATALOG
        if action.dest == "overrides":
            yield from (f"{name}=" for name in sorted({*FIELD_OF, *ALIASES, *field_owners()}))
