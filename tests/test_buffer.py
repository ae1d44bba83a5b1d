"""Replay: rows as they were put in, uniform draws from the rows in use, states that go back in place, mixed batches."""

import numpy as np
import pytest
import torch
from conftest import CPU

from common.buffer import Batch, ReplayBuffer, mix


def rows(first: int, n: int) -> Batch:
    """Row i: observation (i, -i), action i / 100, reward 10 i, successor (i + 0.5, -i), terminal if i % 3 == 0."""
    i = torch.arange(first, first + n, dtype=torch.float32)
    obs, next_obs = torch.stack([i, -i], 1), torch.stack([i + 0.5, -i], 1)
    return Batch(obs, i[:, None] / 100, 10 * i, next_obs, (i % 3 == 0).float())


def add(buffer: ReplayBuffer, first: int, n: int) -> None:
    for obs, action, reward, next_obs, terminated in zip(*rows(first, n), strict=True):
        buffer.add(obs, action, reward.item(), next_obs, bool(terminated))


def test_rows_come_back_field_by_field():
    buffer = ReplayBuffer(10, 2, 1, CPU)
    buffer.extend(rows(0, 4))
    add(buffer, 4, 3)
    assert len(buffer) == 7
    batch = buffer.take(torch.tensor([6, 0, 4, 4]))
    assert batch.obs.tolist() == [[6, -6], [0, 0], [4, -4], [4, -4]]
    assert batch.actions[:, 0].tolist() == pytest.approx([0.06, 0, 0.04, 0.04])
    assert batch.rewards.tolist() == [60, 0, 40, 40]
    assert batch.next_obs.tolist() == [[6.5, -6], [0.5, 0], [4.5, -4], [4.5, -4]]
    assert batch.terminations.tolist() == [1, 1, 0, 0]
    assert [x.shape for x in batch] == [(4, 2), (4, 1), (4,), (4, 2), (4,)]
    assert all(x.dtype == torch.float32 for x in batch)
    assert buffer.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_size_is_a_scalar_on_the_device_that_keeps_its_address():
    buffer = ReplayBuffer(10, 2, 1, CPU)
    address = buffer.size.data_ptr()
    assert buffer.size.shape == () and buffer.size.dtype == torch.int64 and buffer.size.item() == 0
    buffer.extend(rows(0, 4))
    assert buffer.size.item() == 4
    add(buffer, 4, 1)
    assert buffer.size.item() == len(buffer) == 5 and buffer.size.data_ptr() == address


def test_draw_is_uniform_over_the_rows_in_use():
    """70,000 draws from 7 of 10 rows: chi-square with 6 degrees of freedom stays below its 99.9 % point, 22.5."""
    buffer = ReplayBuffer(10, 2, 1, CPU)
    buffer.extend(rows(0, 7))
    torch.manual_seed(0)
    index = buffer.draw(70_000)
    assert index.shape == (70_000,) and index.dtype == torch.int64
    counts = np.bincount(index.numpy(), minlength=7)
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5
    pairs = np.bincount((7 * index[::2] + index[1::2]).numpy(), minlength=49)  # with replacement, independent
    assert ((pairs - 35_000 / 49) ** 2 / (35_000 / 49)).sum() < 84.0  # 99.9 % point with 48 degrees


def test_draw_follows_the_global_generator():
    buffer = ReplayBuffer(100, 2, 1, CPU)
    buffer.extend(rows(0, 100))
    torch.manual_seed(3)
    a = buffer.draw(50)
    b = buffer.draw(50)
    torch.manual_seed(3)
    assert torch.equal(buffer.draw(50), a) and not torch.equal(a, b)


def test_draw_reaches_new_rows_as_the_buffer_grows():
    buffer = ReplayBuffer(5, 2, 1, CPU)
    torch.manual_seed(0)
    for n in range(1, 6):
        add(buffer, n - 1, 1)
        assert set(buffer.draw(500).tolist()) == set(range(n))
    assert buffer.sample(500).obs[:, 0].unique().tolist() == [0, 1, 2, 3, 4]


def test_sample_keeps_the_fields_of_a_row_together():
    buffer = ReplayBuffer(50, 2, 1, CPU)
    buffer.extend(rows(0, 50))
    batch = buffer.sample(64)
    i = batch.obs[:, 0]
    assert torch.equal(batch.rewards, 10 * i) and torch.equal(batch.next_obs[:, 0], i + 0.5)
    assert torch.equal(batch.actions[:, 0], i / 100) and torch.equal(batch.terminations, (i % 3 == 0).float())


def test_a_full_buffer_says_so():
    buffer = ReplayBuffer(3, 2, 1, CPU)
    add(buffer, 0, 3)
    with pytest.raises(IndexError):
        add(buffer, 3, 1)
    assert len(buffer) == 3 and buffer.obs[:, 0].tolist() == [0, 1, 2]


def test_state_holds_only_added_rows_and_goes_back_in_place():
    a, b = ReplayBuffer(10, 2, 1, CPU), ReplayBuffer(10, 2, 1, CPU)
    for buffer in (a, b):
        buffer.extend(rows(0, 4))
    add(a, 4, 3)
    state = a.state_dict()
    assert [x.shape for x in state.values() if isinstance(x, torch.Tensor)] == [(3, 7)]
    a.load_state_dict(b.state_dict())
    add(a, 70, 3)  # the state is a snapshot
    addresses = b.table.data_ptr(), b.size.data_ptr()
    add(b, 90, 5)  # to be overwritten
    b.load_state_dict(state)
    assert addresses == (b.table.data_ptr(), b.size.data_ptr())
    assert len(b) == b.size.item() == 7
    assert b.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert b.take(torch.tensor([6])).rewards.tolist() == [60]
    add(b, 7, 1)
    assert b.obs[-1].tolist() == [7, -7]


def test_a_state_behind_another_dataset_is_refused():
    a, b = ReplayBuffer(10, 2, 1, CPU), ReplayBuffer(10, 2, 1, CPU)
    a.extend(rows(0, 4))
    b.extend(rows(0, 5))
    add(a, 4, 2)
    with pytest.raises(ValueError):
        b.load_state_dict(a.state_dict())
    assert len(b) == 5


def test_mix_keeps_the_halves_in_place():
    mixed = mix(rows(0, 2), rows(5, 3))
    assert mixed.obs[:, 0].tolist() == [0, 1, 5, 6, 7]
    assert mixed.rewards.tolist() == [0, 10, 50, 60, 70]
    assert mixed.next_obs[:, 0].tolist() == [0.5, 1.5, 5.5, 6.5, 7.5]
    assert mixed.actions[:, 0].tolist() == pytest.approx([0, 0.01, 0.05, 0.06, 0.07])
    assert mixed.terminations.tolist() == [1, 0, 0, 1, 0]
