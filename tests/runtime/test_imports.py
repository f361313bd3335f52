"""The garbage collector during imports."""

from __future__ import annotations

import gc

import pytest

from nemo_megacpp.runtime.imports import importing


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_suspended_and_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_what_was_imported_is_not_collected_again() -> None:
    before = gc.get_freeze_count()
    with importing():
        kept = [[number] for number in range(1000)]
    assert gc.get_freeze_count() >= before + len(kept)
