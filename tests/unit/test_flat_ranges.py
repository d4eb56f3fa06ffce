"""Flat ranges of tensors as rectangles."""

import itertools
import math

import pytest
import torch

from oryx_megatron.checkpoint.shards import boxes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 6), (5, 1), (2, 3, 4), (3, 1, 5), (2, 2, 1, 3)])
def test_boxes_cover_a_range_in_order_and_are_few(shape: tuple[int, ...]) -> None:
    """Every range of every shape: exactly its elements, in their order, in no more than 2n - 1 rectangles."""
    size = math.prod(shape)
    tensor = torch.arange(size).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        found = list(boxes(shape, start, stop))
        blocks = [tensor[tuple(slice(a, a + n) for a, n in zip(*box))] for box in found]
        assert [tuple(block.shape) for block in blocks] == [sizes for _, sizes in found]
        assert [int(i) for block in blocks for i in block.flatten()] == list(range(start, stop))
        assert len(found) <= max(2 * len(shape) - 1, 1)


def test_boxes_are_few() -> None:
    """Whole rows are one rectangle, of however many rows."""
    assert list(boxes((10, 4), 8, 32)) == [((2, 0), (6, 4))]
    assert list(boxes((10, 4), 6, 33)) == [((1, 2), (1, 2)), ((2, 0), (6, 4)), ((8, 0), (1, 1))]
    assert list(boxes((10, 4), 5, 7)) == [((1, 1), (1, 2))]
    assert list(boxes((4, 3, 5), 0, 60)) == [((0, 0, 0), (4, 3, 5))]
    assert list(boxes((10, 4), 12, 12)) == []
