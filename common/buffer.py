"""Replay on the device: one packed table, batch indices drawn on the device, nothing that waits for the host."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """Transitions: obs, next_obs (B, O), actions (B, A), rewards, terminations (B,); float32, in training units.

    `terminations` is 1 at the true end of the MDP only: a time limit keeps its bootstrap. `next_obs` is always the
    successor, never the first observation of the next episode.
    """

    obs: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_obs: torch.Tensor
    terminations: torch.Tensor


def mix(a: Batch, b: Batch) -> Batch:
    """The rows of `a`, then those of `b`: the halves of a mixed batch stay where they are."""
    return Batch(*(torch.cat(pair) for pair in zip(a, b, strict=True)))


class ReplayBuffer:
    """Up to `capacity` transitions as rows [obs, actions, reward, next_obs, terminated] of one float32 table.

    The number of rows is a 0-d device tensor beside a host integer, so that a captured step that samples stays right
    while the buffer grows. Rows that `extend` put in are the dataset's and are not part of `state_dict`; those of `add`
    and `append` are.
    """

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: torch.device):
        self.widths = (obs_dim, act_dim, 1, obs_dim, 1)
        self.table = torch.zeros(max(capacity, 1), sum(self.widths), device=device)
        self.size = torch.zeros((), dtype=torch.int64, device=device)
        self.fixed = self.rows = 0  # rows from extend; rows in all
        pin = device.type == "cuda"
        self.staged = torch.empty(sum(self.widths), pin_memory=pin)

    def like(self, capacity: int) -> "ReplayBuffer":
        """An empty buffer for transitions of the same sizes, on the same device."""
        return ReplayBuffer(capacity, *self.widths[:2], self.table.device)

    def __len__(self) -> int:
        return self.rows

    def extend(self, batch: Batch) -> None:
        """Append a dataset, before anything else is added."""
        assert self.rows == self.fixed, "extend comes before add"
        self.append(torch.cat([x if x.ndim == 2 else x[:, None] for x in batch], 1).to(self.table.device))
        self.fixed = self.rows

    def append(self, rows: torch.Tensor) -> None:
        """Append rows of the table's layout, (N, width), as `add` does one by one."""
        self.table[self.rows : self.rows + len(rows)] = rows
        self._resize(self.rows + len(rows))

    def subset(self, mask: np.ndarray) -> "ReplayBuffer":
        """Its dataset rows at `mask` (rows,) bool; itself if that is all of them."""
        if mask.all():
            return self
        other = self.like(int(mask.sum()))
        other.append(self.table[: self.rows][torch.from_numpy(mask).to(self.table.device)])
        other.fixed = other.rows
        return other

    def clear(self) -> None:
        """Forget the rows that are not the dataset's."""
        self._resize(self.fixed)

    def add(
        self, obs: torch.Tensor, action: torch.Tensor, reward: float, next_obs: torch.Tensor, terminated: bool
    ) -> None:
        """Append one transition given as CPU tensors (O,), (A,) and numbers."""
        if self.rows == len(self.table):
            raise IndexError(f"buffer of {len(self.table)} transitions is full")
        flags = torch.tensor([float(terminated)]), torch.tensor([reward], dtype=torch.float32)
        torch.cat([obs, action, flags[1], next_obs, flags[0]], out=self.staged)
        self.table[self.rows].copy_(self.staged)
        self._resize(self.rows + 1)

    def _resize(self, rows: int) -> None:
        self.rows = rows
        self.size.fill_(rows)

    def draw(self, n: int, first: torch.Tensor | None = None) -> torch.Tensor:
        """Indices (n,) of rows, uniform with replacement, from the device's global generator.

        With `first`, a 0-d device tensor, of the first so many rows only.
        """
        # 62 bits, then the remainder: a Python bound would be frozen at capture, and float32 cannot index 2M rows
        return torch.randint(1 << 62, (n,), device=self.table.device).remainder_(
            self.size if first is None else first
        )

    def take(self, index: torch.Tensor) -> Batch:
        """The rows at `index` (n,), gathered at once."""
        obs, actions, rewards, next_obs, terminations = self.table.index_select(0, index).split(
            self.widths, 1
        )
        return Batch(obs, actions, rewards.squeeze(1), next_obs, terminations.squeeze(1))

    def last(self, n: int) -> Batch:
        """The n rows added last."""
        return self.take(torch.arange(self.rows - n, self.rows, device=self.table.device))

    def sample(self, n: int) -> Batch:
        """n rows, uniform with replacement."""
        return self.take(self.draw(n))

    @property
    def obs(self) -> torch.Tensor:
        """Observations of all rows in use, (rows, O); a view."""
        return self.table[: self.rows, : self.widths[0]]

    def state_dict(self) -> dict:
        """The rows that are not the dataset's."""
        return {"fixed": self.fixed, "rows": self.table[self.fixed : self.rows].clone()}

    def load_state_dict(self, state: dict) -> None:
        """Put them back behind the same dataset; addresses stay."""
        if state["fixed"] != self.fixed:
            raise ValueError(f"dataset rows must be {state['fixed']}, got {self.fixed}")
        n = len(state["rows"])
        self.table[self.fixed : self.fixed + n] = state["rows"]
        self._resize(self.fixed + n)


def union_rows(buffers: Sequence[ReplayBuffer], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, width) uniform over the union of buffers, and their indices in it (n,); nothing is read back."""
    device = buffers[0].table.device
    index = torch.randint(1 << 62, (n,), device=device).remainder_(sum(b.size for b in buffers))
    rows, left = 0.0, index
    for b in buffers:
        mine = (left >= 0) & (left < b.size)
        rows = rows + mine[:, None] * b.table.index_select(0, torch.where(mine, left, 0))
        left = left - b.size
    return rows, index
