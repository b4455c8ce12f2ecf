"""Gapped positions on real M-RoPE indices: order kept, images whole, spans as asked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.distill.gaps import image_starts, open_gaps
from laid.errors import LaidError
from tiny_vlm import END, IMAGE, START, prompt, tiny_model

MODEL = tiny_model()
even = st.integers(1, 4).map(lambda n: 2 * n)


def sample(grids, lead=2, between=0, tail=4):
    ids, positions, starts = prompt(MODEL, grids=grids, lead=lead, between=between, tail=tail)
    last = (ids[0] == END).nonzero().max().item() + 1
    return ids[0], positions[:, 0], starts, last


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(even, even), min_size=1, max_size=6),
    st.integers(0, 3),
    st.integers(0, 400),
    st.integers(0, 9999),
    st.booleans(),
)
def test_blocks_move_whole_and_order_is_kept(grids, between, extra, seed, with_text):
    ids, positions, starts, last = sample(grids, between=between)
    assert image_starts(ids, START) == starts
    span = int(positions.max()) + 1
    moved = open_gaps(
        positions, starts, last if with_text else None, span + extra, np.random.default_rng(seed)
    )
    shift = moved - positions
    assert (shift == shift[0]).all()  # every axis moves alike
    shift = shift[0]
    assert (shift.diff() >= 0).all() and shift.min() == 0
    jumps = set((shift.diff().nonzero().flatten() + 1).tolist())
    assert jumps <= set(starts) | ({last} if with_text else set())
    assert span <= int(moved.max()) + 1 <= span + extra
    assert shift[: starts[0]].eq(0).all()
    for start in starts:  # start, image tokens and end share one shift
        block = [start]
        while ids[block[-1]] != END:
            assert ids[block[-1]] in (START, IMAGE)
            block.append(block[-1] + 1)
        assert len(set(shift[block].tolist())) == 1


def test_spans_are_uniform_up_to_the_reach_and_every_slot_is_used():
    _, positions, starts, last = sample([(4, 4)] * 3)
    span = int(positions.max()) + 1
    rng = np.random.default_rng(0)
    moved = torch.stack([open_gaps(positions, starts, last, span + 10, rng) for _ in range(3000)])[:, 0]
    added = moved.max(-1).values - positions.max()
    counts = torch.bincount(added, minlength=11)
    assert len(counts) == 11
    assert ((counts - 3000 / 11).abs() < 5 * (3000 / 11) ** 0.5).all()
    gaps = (moved - positions[0])[:, [*starts, last]].diff(
        prepend=torch.zeros(3000, 1, dtype=torch.long), dim=1
    )
    means = gaps.float().mean(0)
    assert (means - 5 / 4).abs().max() < 0.15  # all four slots alike
    assert (gaps >= 0).all()


def test_drawn_by_log_every_doubling_of_the_span_is_equally_likely():
    _, positions, starts, last = sample([(4, 4)] * 3)
    span = int(positions.max()) + 1
    rng = np.random.default_rng(0)
    moved = torch.stack([open_gaps(positions, starts, last, 8 * span, rng, draw="log") for _ in range(3000)])[
        :, 0
    ]
    spans = moved.max(-1).values + 1
    assert spans.min() >= span and spans.max() < 8 * span
    counts = torch.histc(torch.log2(spans / span), bins=3, min=0, max=3)  # floor() shifts a few to the left
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()
    assert torch.equal(open_gaps(positions, starts, last, span, rng, draw="log"), positions)
    with pytest.raises(LaidError, match="draw is 'cubic', allowed: uniform, log"):
        open_gaps(positions, starts, last, 8 * span, rng, draw="cubic")


def test_same_rng_state_same_positions_and_no_room_no_change():
    _, positions, starts, last = sample([(4, 4), (6, 2)])
    a, b = (open_gaps(positions, starts, last, 99, np.random.default_rng([7, 1])) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(open_gaps(positions, starts, last, 3, np.random.default_rng(0)), positions)
    assert torch.equal(open_gaps(positions, [], None, 99, np.random.default_rng(0)), positions)


def test_short_haystack_reaches_the_positions_of_a_long_one():
    """20 images given the reach of 150 can stand where the 150th would: the last one lands within 1 % of it."""
    _, long, _, _ = sample([(4, 4)] * 150)
    _, short, starts, last = sample([(4, 4)] * 20)
    rng = np.random.default_rng(3)
    reached = max(int(open_gaps(short, starts, last, int(long.max()) + 1, rng).max()) for _ in range(400))
    assert 0.99 * int(long.max()) <= reached <= int(long.max())


def test_clear_errors():
    _, positions, starts, last = sample([(4, 4), (4, 4)])
    for wrong_starts, text in ((starts[::-1], last), ([*starts, 500], None), (starts, starts[0])):
        with pytest.raises(LaidError, match="ascending token indices"):
            open_gaps(positions, wrong_starts, text, 99, np.random.default_rng(0))
