"""Python's collector of cycles around the start of a run."""

import gc

import pytest

from oryx_megatron.train import collector


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
