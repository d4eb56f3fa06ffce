"""Python's collector of cycles around the start of a run."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from oryx_megatron.train import collector


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    """Ranks of other tests begin with frozen imports."""
    gc.unfreeze()
    yield
    gc.unfreeze()


class Model:
    def __init__(self) -> None:
        self.own = self  # held by a cycle, as models are


def test_it_is_off_until_the_run_is_built_and_does_not_look_there_again() -> None:
    frozen = gc.get_freeze_count()
    with collector.put_off():
        assert not gc.isenabled()
        collector.settle()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
        count = gc.get_freeze_count()
        collector.settle()  # a second trainer of the process
        assert gc.get_freeze_count() <= count
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_it_is_on_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="wrong"), collector.put_off():
        raise ValueError("wrong")
    assert gc.isenabled()


def test_whoever_did_not_put_it_off_keeps_it_as_it_was() -> None:
    frozen = gc.get_freeze_count()
    collector.settle()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_trained_model_goes_once_it_is_thawed() -> None:
    """The router trains beside what is left of it."""
    with collector.put_off():
        model = Model()
        alive = weakref.ref(model)
        collector.settle()
        del model
        gc.collect()
        assert alive() is not None
        collector.thaw()
        gc.collect()
        assert alive() is None


def test_what_the_caller_set_stays() -> None:
    gc.disable()
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        collector.settle()  # a trainer without the command
        assert not gc.isenabled()
        with collector.put_off():
            collector.settle()
            assert not gc.isenabled()
        assert not gc.isenabled()
        assert gc.get_freeze_count() >= frozen - 100  # not thawed: what ended since is gone
    finally:
        gc.enable()
    with collector.put_off():
        collector.settle()
        assert gc.isenabled()
    assert gc.get_freeze_count() > 0
