import pytest
import torch
from tiny import tokens

from qat.training.datamodule import Batches, TokenData, Windows


def test_batch_k_is_a_pure_function_of_seed_and_k():
    windows = torch.arange(70).view(7, 10)
    a, b = Batches(windows, 3, seed=5), Batches(windows, 3, seed=5)
    backwards = [b.batch(k) for k in reversed(range(12))][::-1]
    assert all(torch.equal(a.batch(k), backwards[k]) for k in range(12))
    assert not torch.equal(torch.stack([Batches(windows, 3, 6).batch(k) for k in range(4)]), torch.stack(backwards[:4]))


def test_iteration_starts_where_it_is_told():
    batches = Batches(torch.arange(70).view(7, 10), 2, seed=0, start=3)
    iterator = iter(batches)
    assert torch.equal(next(iterator), batches.batch(3))
    assert torch.equal(next(iterator), batches.batch(4))


def test_an_epoch_takes_every_window_once():
    batches = Batches(torch.arange(8)[:, None], 2, seed=0)
    first = torch.cat([batches.batch(k) for k in range(4)]).flatten().tolist()
    second = torch.cat([batches.batch(k) for k in range(4, 8)]).flatten().tolist()
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def order(seed, epoch):
    """The windows of an epoch, by number."""
    batches = Batches(torch.arange(64)[:, None], 64, seed)
    return batches.batch(epoch).flatten().tolist()


def test_epochs_of_one_seed_are_not_those_of_another():
    orders = [tuple(order(seed, epoch)) for seed in range(-2, 5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_the_first_epoch_is_in_the_order_of_the_seed_itself(seed):
    assert order(seed, 0) == torch.randperm(64, generator=torch.Generator().manual_seed(seed)).tolist()


def test_iterating_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    iterator = iter(Batches(torch.arange(8)[:, None], 2, seed=0))
    for _ in range(9):
        next(iterator)
    list(Windows(torch.arange(8)[:, None], 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_comes_in_batches_and_leaves_none_out():
    windows = torch.arange(8)[:, None]
    batches = list(Windows(windows, 3))
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert len(Windows(windows, 3)) == 3
    assert torch.equal(torch.cat(batches), windows)


def test_validation_takes_what_there_is(tmp_path):
    data = TokenData(tokens(tmp_path / "t", held_out=100), 16, 2, val_windows=4)
    assert [tuple(w.shape) for w in data.val_dataloader()] == [(2, 16)] * 2
    assert len(TokenData(tokens(tmp_path / "t", held_out=40), 16, 2, val_windows=4).val_dataloader()) == 1
    assert TokenData(tokens(tmp_path / "t", held_out=8), 16, 2).val_dataloader() == []
