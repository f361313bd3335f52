"""The pattern language: what it reads, what it refuses, and that it never loses a layer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.pattern import BUILT_IN, CUT, MTP, Family, HybridPattern, MegatronArgument

A, M, E, R = Family.ATTENTION, Family.MAMBA, Family.EXPERT, Family.RECURRENT
F = Family.FEED_FORWARD
UNIT = "AEMEAEMEAEMR"
OLD: MegatronArgument = "hybrid_override_pattern"
NEW: MegatronArgument = "hybrid_layer_pattern"


def test_families_have_letters_long_names_and_megatron_symbols() -> None:
    assert [(f.value, f.long_name, f.megatron_symbol) for f in BUILT_IN] == [
        ("A", "ablock", "*"),
        ("M", "mblock", "M"),
        ("E", "eblock", "E"),
        ("R", "rblock", "R"),
        ("F", "fblock", "-"),
    ]


def test_megatron_symbols_are_those_of_megatron_core() -> None:
    allocation = pytest.importorskip("megatron.core.ssm.mamba_hybrid_layer_allocation")
    symbols = allocation.Symbols
    assert A.megatron_symbol == symbols.ATTENTION
    assert M.megatron_symbol == symbols.MAMBA
    assert E.megatron_symbol == symbols.MOE
    assert F.megatron_symbol == symbols.MLP
    ours = {family.megatron_symbol for family in BUILT_IN if family.is_megatrons}
    if hasattr(symbols, "VALID"):  # hybrid_override_pattern
        assert ours == symbols.VALID
        return
    assert (symbols.PIPE, symbols.MTP_SEPARATOR) == (CUT, MTP)
    for symbol in symbols.VALID_LAYERS - ours:  # each has a name in the refusal
        with pytest.raises(UserError, match="In Megatron's hybrid_layer_pattern it is "):
            HybridPattern.from_megatron(symbol, NEW)


def test_nam56r_has_its_published_counts() -> None:
    pattern = HybridPattern.parse(UNIT, depth=52)
    assert pattern.counts() == {A: 13, E: 22, M: 13, R: 4, F: 0}
    assert len(pattern) == 52
    assert pattern.letters == UNIT * 4 + "AEME"
    stages = pattern.chunks(4)
    assert [len(stage) for stage in stages] == [13, 13, 13, 13]
    assert [sum(pattern.families[i] is R for i in stage) for stage in stages] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("aemeaemeaemr", UNIT),
        ("AEME AEME\n AEMR", UNIT),
        ("A|eM", "A|EM"),
        (" a | e m ", "A|EM"),
        ("*EM|R", "AEM|R"),
        ("-*-|M", "FAF|M"),
        ("f, -, fblock", "FFF"),
        ("ablock, eblock, mblock", "AEM"),
        ("ABlock eblock | mblock rblock", "AE|MR"),
        ("A,E,M,", "AEM"),
        ("M", "M"),
    ],
)
def test_accepted_spellings(text: str, canonical: str) -> None:
    pattern = HybridPattern.parse(text)
    assert str(pattern) == canonical
    assert HybridPattern.parse(str(pattern)) == pattern
    assert pattern.letters == canonical.replace("|", "")


@pytest.mark.parametrize(
    ("unit", "depth", "expected"),
    [
        ("AEM", 7, "AEMAEMA"),
        ("AEM", 3, "AEM"),
        ("AE|M", 7, "AE|MAE|MA"),
        ("AEM|", 7, "AEM|AEM|A"),
        ("AEM|", 6, "AEM|AEM"),  # the last cut falls on the stack's end
        ("AEM|", 3, "AEM"),
        ("A|E|M|", 4, "A|E|M|A"),
        ("A|E|M|", 5, "A|E|M|A|E"),
    ],
)
def test_tiling_repeats_cuts_and_truncates(unit: str, depth: int, expected: str) -> None:
    assert str(HybridPattern.parse(unit, depth=depth)) == expected


@pytest.mark.parametrize(
    ("text", "caret_at", "words"),
    [
        ("AEXME", 2, "'X' is not a letter"),
        ("  AEM+", 5, "'+' is not a letter"),
        ("A\nE\tQ", 4, "'Q' is not a letter"),
        ("aemblock", 3, "'b' is not a letter"),
        ("ablock, xblock", 8, "'x' is not a letter"),
        ("|AEM", 0, "first pipeline chunk is empty"),
        ("AE||M", 3, "chunk is empty"),
        ("AE| |M", 4, "chunk is empty"),
        ("AEM|", 3, "last pipeline chunk is empty"),
        ("A,,M", 2, "layer is missing"),
        (",A", 0, "layer is missing"),
    ],
)
def test_refusals_put_a_caret_under_the_fault(text: str, caret_at: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        HybridPattern.parse(text)
    message = str(caught.value)
    assert words in message
    _, shown, caret = message.splitlines()[:3]
    assert shown.rstrip() == "  " + text.replace("\n", " ").replace("\t", " ").rstrip()
    assert caret == "  " + " " * caret_at + "^"


@pytest.mark.parametrize(
    ("letter", "number", "latin"),
    [("\u0410", "U+0410", "A"), ("\u0395", "U+0395", "E"), ("\uff2d", "U+FF2D", "M")],
)
def test_a_letter_that_looks_latin(letter: str, number: str, latin: str) -> None:
    """Cyrillic, Greek and full-width."""
    with pytest.raises(UserError) as caught:
        HybridPattern.parse(f"AE{letter}R")
    assert f"({number}) is not a letter of the pattern (position 3)" in str(caught.value)
    assert f"\nWrite the Latin letter {latin}. Legal letters: A (ablock)" in str(caught.value)
    with pytest.raises(UserError, match=r"\(U\+00DC\) is not a letter .*\n.*\n.*\nLegal letters"):
        HybridPattern.parse("A\u00dc")


def test_an_unknown_letter_names_the_legal_ones() -> None:
    with pytest.raises(UserError, match=r"A \(ablock\), M \(mblock\), E \(eblock\), R \(rblock\)"):
        HybridPattern.parse("AEZ")
    with pytest.raises(UserError, match=r"\* \(ablock\).*writes attention as '\*'"):
        HybridPattern.from_megatron("AEM", OLD)
    with pytest.raises(UserError, match=r"- \(fblock\).*writes an MLP layer as '-'"):
        HybridPattern.from_megatron("*F", OLD)


@pytest.mark.parametrize("text", ["|AE", "A||E"])
def test_empty_chunks_are_refused_in_a_unit_too(text: str) -> None:
    with pytest.raises(UserError, match="chunk is empty"):
        HybridPattern.parse(text, depth=8)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_patterns_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="empty"):
        HybridPattern.parse(text)


@pytest.mark.parametrize("text", [None, 7, ["A"], b"AE"])
def test_what_is_no_string_is_refused(text: object) -> None:
    with pytest.raises(UserError, match="is a string"):
        HybridPattern.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [0, -1, True, 2.0, "52"])
def test_depths_that_are_no_depth_are_refused(depth: object) -> None:
    with pytest.raises(UserError, match="positive number of layers"):
        HybridPattern.parse("AE", depth=depth)  # type: ignore[arg-type]


def test_a_depth_that_would_drop_a_family_is_refused() -> None:
    with pytest.raises(UserError, match=r"depth of 11 .* 12 layers"):
        HybridPattern.parse(UNIT, depth=11)


@pytest.mark.parametrize("cuts", [(0,), (3,), (2, 1), (1, 1), (-1,)])
def test_the_constructor_refuses_bad_cuts(cuts: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="strictly increasing, between 1 and 2 for 3 layers"):
        HybridPattern((A, E, M), cuts)
    with pytest.raises(UserError, match="at least one layer"):
        HybridPattern(())


@pytest.mark.parametrize("text", ["AEMR", "AE|M|R", "M", "R|A", "FAF|MF"])
def test_megatron_round_trip(text: str) -> None:
    pattern = HybridPattern.parse(text)
    symbols = text.translate({ord("A"): "*", ord("F"): "-"})
    assert pattern.to_megatron(OLD, cuts=True) == symbols
    assert pattern.to_megatron(OLD) == symbols.replace("|", "")
    assert HybridPattern.from_megatron(pattern.to_megatron(OLD, cuts=True), OLD) == pattern
    assert HybridPattern.from_megatron(symbols.replace("|", ""), OLD).families == pattern.families


@pytest.mark.parametrize("text", ["AE", "m*", "*,M", "ablock", "MF"])
@pytest.mark.parametrize("argument", [OLD, NEW])
def test_from_megatron_reads_only_megatron(text: str, argument: MegatronArgument) -> None:
    with pytest.raises(UserError):
        HybridPattern.from_megatron(text, argument)


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("AEM|F", "*EM|-"),
        ("AM/AE", "*M/*E"),
        ("M|AE/M/M", "M|*E/M/M"),
        ("m | a e / m / mblock", "M|*E/M/M"),
    ],
)
def test_the_newer_language_round_trip(text: str, symbols: str) -> None:
    pattern = HybridPattern.parse(text)
    assert pattern.to_megatron(NEW, cuts=True) == symbols
    assert pattern.to_megatron(NEW) == symbols.replace("|", "")
    assert HybridPattern.from_megatron(symbols, NEW) == pattern
    assert HybridPattern.parse(str(pattern)) == pattern


def test_prediction_depths_are_no_layers_of_the_stack() -> None:
    pattern = HybridPattern.parse("AM|/E/E", depth=5)
    assert str(pattern) == "AM|AM|A/E/E"
    assert (len(pattern), pattern.letters, pattern.counts()[E]) == (5, "AMAMA", 0)
    assert (pattern.mtp_families, pattern.mtp_num_depths) == ((E,), 2)
    assert [len(chunk) for chunk in pattern.chunks(3)] == [2, 2, 1]
    with pytest.raises(UserError, match="2 multi-token prediction depths of 0 layers"):
        HybridPattern((A,), mtp_num_depths=2)


@pytest.mark.parametrize(
    ("text", "caret_at", "words"),
    [
        ("/AE", 0, "no layers before the first prediction depth"),
        ("AE/", 2, "no layers in this prediction depth"),
        ("AE//A", 3, "no layers in this prediction depth"),
        ("AE|/A", 3, "last pipeline chunk is empty"),
        ("AE/A|E", 4, "no cut here"),
        ("AE/AE/A", 6, "has the layers of the first one"),
    ],
)
def test_prediction_depths_that_are_wrong(text: str, caret_at: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        HybridPattern.parse(text)
    assert str(caught.value).splitlines()[2] == "  " + " " * caret_at + "^"


def test_symbols_of_the_other_language_are_refused_by_name() -> None:
    for symbol, layer in (("G", "Gated DeltaNet"), ("D", "sparse att"), ("+", "latent attention")):
        for argument in (OLD, NEW):
            with pytest.raises(UserError, match=f"it is .*{layer}"):
                HybridPattern.from_megatron(f"M{symbol}", argument)
        with pytest.raises(UserError, match=f"it is .*{layer}"):
            HybridPattern.parse(f"M{symbol}")
    with pytest.raises(UserError, match="no symbol for this package's R"):
        HybridPattern.from_megatron("*R", NEW)
    with pytest.raises(UserError, match=r"part of hybrid_layer_pattern, from 0\.17 on"):
        HybridPattern.from_megatron("*M/M", OLD)
    with pytest.raises(UserError, match="hybrid_override_pattern has no multi-token prediction"):
        HybridPattern.parse("AM/M").to_megatron(OLD)


def test_stand_ins_are_asked_for() -> None:
    pattern = HybridPattern.parse("AE|MR/R")
    with pytest.raises(UserError, match="hybrid_layer_pattern has no symbol for R"):
        pattern.to_megatron(NEW)
    assert pattern.to_megatron(NEW, cuts=True, stand_ins=True) == "*E|MM/M"


@pytest.mark.parametrize("depth", [1, 12, 52, 60])
def test_equal_chunks_cover_every_layer_once(depth: int) -> None:
    pattern = HybridPattern((A,) * depth)
    for n in range(1, depth + 4):
        if depth % n:
            with pytest.raises(UserError, match=f"{depth} layers cannot be divided into {n} "):
                pattern.chunks(n)
            continue
        chunks = pattern.chunks(n)
        assert [layer for chunk in chunks for layer in chunk] == list(range(depth))
        assert {len(chunk) for chunk in chunks} == {depth // n}


def test_a_refused_division_names_legal_sizes_and_cuts_that_work() -> None:
    pattern = HybridPattern.parse(UNIT, depth=52)
    with pytest.raises(UserError) as caught:
        pattern.chunks(8)
    message = str(caught.value)
    assert "Legal numbers of chunks: 1, 2, 4, 13, 26, 52;" in message
    assert "(6+6+7+7+7+7+6+6 layers)" in message  # the ends also hold embedding, head and loss
    offered = HybridPattern.parse(message.split("'")[1])
    assert offered.families == pattern.families
    assert [len(chunk) for chunk in offered.chunks(8)] == [6, 6, 7, 7, 7, 7, 6, 6]


def test_more_chunks_than_layers_has_no_example() -> None:
    with pytest.raises(UserError, match=r"Legal numbers of chunks: 1, 2\.$"):
        HybridPattern.parse("AE").chunks(3)


def test_explicit_cuts_make_exactly_their_own_chunks() -> None:
    pattern = HybridPattern.parse("AEM|E|AR")
    assert pattern.chunks(3) == (range(0, 3), range(3, 4), range(4, 6))
    assert pattern.chunks(1) == (range(0, 6),)  # a cut model still loads on one rank
    for n in (2, 4, 6):
        with pytest.raises(UserError, match=rf"cut into 3 .*\(3\+1\+2 layers\), but .* {n} \("):
            pattern.chunks(n)


@pytest.mark.parametrize("n", [0, -2, True, 2.0])
def test_chunk_numbers_that_are_none_are_refused(n: object) -> None:
    with pytest.raises(UserError, match="positive integer"):
        HybridPattern.parse("AE").chunks(n)  # type: ignore[arg-type]


@pytest.mark.processes
def test_pattern_and_layout_import_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, nemo_megacpp.pattern, nemo_megacpp.layout;"
        "print([m for m in ('torch', 'megatron', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
