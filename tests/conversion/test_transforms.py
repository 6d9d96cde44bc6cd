"""Properties of the transforms: the split undoes the join; tensor parallelism cuts joined tensors as Megatron does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.conversion.transforms import QueryKeyValue, Reshaped, Rows, Same


def numbered(*shapes):
    parts, start = [], 0
    for shape in shapes:
        count = int(torch.tensor(shape).prod())
        parts.append(torch.arange(start, start + count, dtype=torch.float32).reshape(shape))
        start += count
    return parts


sizes = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(groups=sizes, per_group=sizes, width=sizes, hidden=sizes, tensor_parallel=st.integers(1, 3), bias=st.booleans())
def test_query_key_value(groups, per_group, width, hidden, tensor_parallel, bias):
    groups *= tensor_parallel
    rest = () if bias else (hidden,)
    heads = groups * per_group
    shapes = [(heads * width, *rest), (groups * width, *rest), (groups * width, *rest)]
    parts = numbered(*shapes)
    transform = QueryKeyValue(heads, groups)
    joined = transform.join(parts)
    assert tuple(joined.shape) == transform.joined_shape(shapes)
    for part, back in zip(parts, transform.split(joined, shapes), strict=True):
        assert torch.equal(part, back)
    # Group i is its query heads, then its key, then its value.
    i, rows = groups - 1, (per_group + 2) * width
    group = joined[i * rows : (i + 1) * rows]
    assert torch.equal(group[: per_group * width], parts[0][i * per_group * width : (i + 1) * per_group * width])
    assert torch.equal(group[per_group * width : -width], parts[1][i * width : (i + 1) * width])
    assert torch.equal(group[-width:], parts[2][i * width : (i + 1) * width])
    # A rank's slice is the join of its heads and groups alone.
    for rank, mine in enumerate(joined.chunk(tensor_parallel)):
        own = [part.chunk(tensor_parallel)[rank] for part in parts]
        assert torch.equal(mine, QueryKeyValue(heads // tensor_parallel, groups // tensor_parallel).join(own))


@settings(max_examples=30, deadline=None)
@given(first=sizes, second=sizes, hidden=sizes)
def test_rows(first, second, hidden):
    shapes = [(first, hidden), (second, hidden)]
    gate, up = numbered(*shapes)
    joined = Rows().join([gate, up])
    assert tuple(joined.shape) == Rows().joined_shape(shapes)
    assert torch.equal(joined[: Rows().first_row(1, shapes)], gate)
    assert all(torch.equal(a, b) for a, b in zip(Rows().split(joined, shapes), [gate, up], strict=True))


@pytest.mark.parametrize("transform", [Same(0), Reshaped((1, 1, 6))])
def test_single(transform):
    (part,) = numbered((6,))
    joined = transform.join([part])
    assert tuple(joined.shape) == transform.joined_shape([(6,)])
    assert torch.equal(transform.split(joined, [(6,)])[0], part)
