"""The order of clips, shares of processes and workers, and going on at any step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinetok.errors import UserError
from kinetok.train.data.loading import Order, load


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_clip_once_an_epoch_over_all_processes(count: int, batch: int, world: int, seed: int) -> None:
    clips = np.arange(count) * 7 + 3
    order = Order(clips, batch, seed)
    steps = 3 * count // batch + 2
    drawn = [order.step(step) for step in range(steps)]
    for share in drawn:
        parts = [share[rank::world] for rank in range(world)]  # what process r of R takes
        assert sorted(np.concatenate(parts)) == sorted(share)
    stream = np.concatenate(drawn)
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == sorted(clips)
    for step in reversed(range(steps)):  # from anywhere, in any order, and in another process
        np.testing.assert_array_equal(Order(clips, batch, seed).step(step), drawn[step])
        np.testing.assert_array_equal(order.step(step), drawn[step])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    clips = np.arange(100)
    one, other = Order(clips, 100, 1), Order(clips, 100, 2)
    orders = [tuple(order.step(step)) for order in (one, other) for step in range(3)]
    assert len(set(orders)) == 6
    draws = [float(order.rng(step).random()) for order in (one, other) for step in range(3)]
    assert len(set(draws)) == 6 and draws[1] == float(Order(clips, 100, 1).rng(1).random())
    with pytest.raises(UserError, match="expected clips and a batch above 0"):
        Order(clips[:0], 5, 0)


class Steps:
    """Something of a step that depends on the step and the clips alone."""

    def __init__(self, bad: int = -1) -> None:
        self.order, self.bad = Order(np.arange(23), 5, 4), bad

    def __call__(self, step: int) -> tuple[np.ndarray, list[torch.Tensor]]:
        if step == self.bad:
            raise UserError(f"the bytes of step {step} have changed")
        clips = self.order.step(step)
        return clips, [torch.from_numpy(clips) * step, torch.tensor(self.order.rng(step).random(3))]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_steps_from_anywhere(workers: int) -> None:
    whole = list(load(Steps(), 0, 12))
    for start in (0, 5):
        made = list(load(Steps(), start, 12, workers))
        assert len(made) == 12 - start
        for (clips, tensors), (others, their) in zip(made, whole[start:], strict=True):
            np.testing.assert_array_equal(clips, others)
            assert all(torch.equal(a, b) for a, b in zip(tensors, their, strict=True))


def test_an_error_comes_at_its_step() -> None:
    steps = load(Steps(bad=4), 0, 12, 2)
    for step in range(4):
        assert len(next(steps)[0]) == 5 and step < 4
    with pytest.raises(UserError, match=r"^the bytes of step 4 have changed$"):
        next(steps)


def test_steps_that_nobody_takes_are_not_made() -> None:
    made: list[int] = []
    steps = load(made.append, 0, 1000, 2)
    next(steps)
    steps.close()
    assert len(made) <= 2 * 2 + 2


def test_many_threads_read_one_store(motionmillion: Path, tmp_path: Path, monkeypatch, clip_features) -> None:
    pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
    from kinetok.train.data import shards
    from kinetok.train.data.shard_import import import_shards

    monkeypatch.setattr(shards, "OPEN_FILES", 2)  # so that files are closed while others read
    import_shards(motionmillion, tmp_path / "store", clips=3)
    store = shards.ClipStore(tmp_path / "store")
    names = [store.id(clip) for clip in range(25)]
    order = Order(np.arange(25), 4, 0)
    for step, read in enumerate(load(lambda step: [store.read(int(c)) for c in order.step(step)], 0, 50, 4)):
        for clip, features in zip(order.step(step), read, strict=True):
            np.testing.assert_array_equal(features, clip_features(names[clip]))
