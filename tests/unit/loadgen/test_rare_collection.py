"""The garbage collector runs rarely, and afterwards as before."""

import gc
import weakref

import pytest

from loadgen.rare_collection import rare_collection


class Ring:
    """An object that only the garbage collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_cycles_are_freed_at_the_end() -> None:
    with rare_collection(1 << 20):
        before = weakref.ref(Ring())
        rings = [weakref.ref(Ring()) for _ in range(2_000)]
        assert before() is not None
    assert not any(ring() for ring in rings)


@pytest.mark.parametrize("set_aside", [False, True])
def test_the_collector_has_its_old_settings_afterwards(set_aside: bool) -> None:
    had = gc.get_freeze_count()
    (gc.freeze if set_aside else gc.unfreeze)()
    before = gc.get_threshold()
    with rare_collection(12_345):
        assert gc.get_threshold() == (12_345, *before[1:])
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    assert (gc.get_freeze_count() > 0) == set_aside
    if had:
        gc.freeze()
