"""Tasks, dataset files, downloads, replay, the environment loop, evaluation, and collecting data.

Files are made by hand in tmp_path, web servers listen on 127.0.0.1; nothing here needs a network or a real dataset.
"""

import contextlib
import copy
import hashlib
import json
import random
import socket
import struct
import threading
import warnings
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
import torch

from common import data, envs
from common.buffer import Batch, ReplayBuffer, mix
from common.run import UsageError
from common.tools import collect

torch.set_num_threads(1)

HOPPER = "hopper-medium-v2"
CPU = torch.device("cpu")
TINY = replace(data.TASKS[HOPPER], obs_dim=1, act_dim=1)  # for files whose numbers can be read at a glance


# ---- helpers ----


def write(path: Path, arrays: dict, **options) -> Path:
    """`arrays` as an HDF5 file."""
    with h5py.File(path, "w") as f:
        for k, v in arrays.items():
            f.create_dataset(k, data=v, **options)
    return path


def good(rows: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of a flawless Hopper file; the last row is a terminal."""
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(rows, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) == rows - 1,
        "timeouts": np.zeros(rows, bool),
        "next_observations": rng.normal(size=(rows, 11)).astype(np.float32),
    }


def tiny(rows: int, terminals: list[int], timeouts: list[int] | None, successors: bool) -> dict:
    """Row i: observation 10i, reward i + 1, action i / 100, successor (if asked for) 10i + 5."""
    i = np.arange(rows, dtype=np.float32)
    arrays = {"observations": 10 * i[:, None], "actions": i[:, None] / 1e4, "rewards": i + 1}
    arrays["terminals"] = np.isin(np.arange(rows), terminals)
    if timeouts is not None:
        arrays["timeouts"] = np.isin(np.arange(rows), timeouts)
    if successors:
        arrays["next_observations"] = 10 * i[:, None] + 5
    return arrays


def read_tiny(tmp_path: Path, *content, limit: int = 1_000) -> data.Dataset:
    path = write(tmp_path / "tiny.hdf5", tiny(*content))
    return data.read_d4rl(path, replace(TINY, limit=limit), "hash")


def refusal(path: Path, name: str = HOPPER) -> str:
    """The message with which `path` is refused: one line that names it, and no warning beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError) as e:
            data.load(name, path)
    message = str(e.value)
    assert len(message.splitlines()) == 1 and str(path) in message
    return message


class Walk(gym.Env):
    """Observation (age, noisy walk), reward = age; `fall` and `limit` are the ages at which it ends."""

    def __init__(self, limit: int = 5, fall: int = 0):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = gym.spaces.Box(-1, 1, (1,))
        self.limit, self.fall, self.seeds, self.drift = limit, fall, [], 0.0

    def reset(self, *, seed: int | None = None, **_) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.age, self.x = 0, self.np_random.normal()
        return np.array([self.age, self.x]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.age += 1
        self.x = 0.9 * self.x + float(action[0]) + 0.1 * self.np_random.normal() + self.drift
        return np.array([self.age, self.x]), self.age, self.age == self.fall, self.age >= self.limit, {}


def hold(obs: torch.Tensor) -> torch.Tensor:
    """The policy that does nothing, for one action dimension."""
    return torch.zeros(len(obs), 1)


# ---- 1: the table ----


def test_the_table_is_d4rl_s_tasks_dual_s_and_the_embedded_one():
    names = {
        f"{robot}-{quality}-v2"
        for robot in ("hopper", "halfcheetah", "walker2d")
        for quality in ("random", "medium", "medium-replay", "medium-expert", "expert")
    }
    hands = {
        f"{x}-{y}-v1" for x in ("pen", "door", "hammer", "relocate") for y in ("human", "cloned", "expert")
    }
    lakes = {
        f"frozenlake-{x}{y}" for x in ("4x4", "8x8") for y in ("", *(f"-slip-0.{k}" for k in range(1, 5)))
    }
    mazes = {f"maze2d-{x}-v1" for x in ("umaze", "medium", "large")} | {
        f"antmaze-{x}-v2"
        for x in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
    }
    shifts = {"halfcheetah-friction-2.0", "halfcheetah-medium-replay-gravity-2.0", "hopper-friction-2.0"}
    shifts |= {"hopper-kinematic-2.0", "walker2d-morphology-2.0"}
    assert set(data.TASKS) == names | hands | lakes | mazes | shifts | {"hopper-mini-v0"}
    assert len(data.TASKS) == 15 + 12 + 10 + 9 + 5 + 1
    assert all(name == task.name for name, task in data.TASKS.items())
    assert all(data.TASKS[name].limit == 1_000 for name in names | {"hopper-mini-v0"})


def test_rows_of_the_table_against_d4rl_s_published_files():
    """Sizes, row counts and hashes as TFDS and the public probes give them."""
    replay, cheetah = data.TASKS["hopper-medium-replay-v2"], data.TASKS["halfcheetah-expert-v2"]
    assert (replay.obs_dim, replay.act_dim, replay.size, replay.rows) == (11, 3, 75_854_457, 402_000)
    assert replay.sha256 == "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b"
    assert (cheetah.obs_dim, cheetah.act_dim, cheetah.size, cheetah.rows) == (17, 6, 237_464_597, 1_000_000)
    walker = data.TASKS["walker2d-medium-expert-v2"]
    assert (walker.obs_dim, walker.act_dim, walker.size, walker.rows) == (17, 6, 462_197_079, 1_999_995)
    hashes = {t.file: t.sha256 for t in data.TASKS.values() if t.sha256}.values()
    assert len(set(hashes)) == len(hashes) == 15 + 9 + 5 + 1 and all(len(h) == 64 for h in hashes)


def test_urls_and_paths(monkeypatch):
    """D4RL's host and ~/.d4rl/datasets unless $D4RL_URL and $D4RL_DATASET_DIR say otherwise."""
    monkeypatch.delenv("D4RL_URL", raising=False)
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    task = data.TASKS["hopper-medium-replay-v2"]
    host = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
    assert task.url == host + "/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"
    assert data.TASKS["walker2d-random-v2"].url == host + "/gym_mujoco_v2/walker2d_random-v2.hdf5"
    assert task.path == Path("/home/someone/.d4rl/datasets/hopper_medium_replay-v2.hdf5")
    monkeypatch.setenv("D4RL_URL", "http://mirror:8000/d4rl/")
    monkeypatch.setenv("D4RL_DATASET_DIR", "/big/disk")
    assert task.url == "http://mirror:8000/d4rl/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"
    assert task.path == Path("/big/disk/hopper_medium_replay-v2.hdf5")
    mini = data.TASKS["hopper-mini-v0"]
    assert mini.source == "package" and task.source == "d4rl"
    assert mini.path == Path(data.__file__).parent / "datasets" / "hopper-mini-v0.hdf5"


def test_score_is_d4rl_s():
    """0 at R_min, 100 at R_max; (1000 + 20.272305) / 3254.572305 = 0.3134889; 50 half-way."""
    for robot, low, high in (
        ("hopper", -20.272305, 3234.3),
        ("halfcheetah", -280.178953, 12135.0),
        ("walker2d", 1.629008, 4592.3),
    ):
        task = data.TASKS[f"{robot}-medium-v2"]
        assert task.score(low) == 0 and task.score(high) == pytest.approx(100)
    assert data.TASKS[HOPPER].score(1_000.0) == pytest.approx(31.34889, abs=1e-4)
    assert data.TASKS["hopper-mini-v0"].score(1_000.0) == pytest.approx(31.34889, abs=1e-4)
    assert data.TASKS["halfcheetah-expert-v2"].score(5927.4105235) == pytest.approx(50)
    assert data.TASKS["walker2d-random-v2"].score(2296.964504) == pytest.approx(50)


def test_an_unknown_task_is_a_usage_error_that_lists_the_known_ones():
    for name in ("hopper-medium-v3", "", "Hopper-medium-v2"):
        with pytest.raises(UsageError) as e:
            data.load(name)
        assert all(known in str(e.value) for known in data.TASKS)
        assert "\n" not in str(e.value)


def test_a_run_on_one_s_own_file_is_filed_under_another_name():
    assert data.filed_name(HOPPER, None) == HOPPER
    assert data.filed_name(HOPPER, Path("/a/mine.v1.hdf5")) == "hopper-medium-v2@mine.v1"


# ---- 2: the loader ----


def test_a_file_with_successors_keeps_every_row(tmp_path):
    """Terminal row 2, timeout row 4, unfinished tail: the successors are the file's, 10i + 5, on all of them."""
    d = read_tiny(tmp_path, 7, [2], [4], True)
    assert d.obs[:, 0].tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert d.next_obs[:, 0].tolist() == [5, 15, 25, 35, 45, 55, 65]
    assert d.terminations.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert d.ends.tolist() == [False, False, True, False, True, False, False]
    assert d.rewards.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert d.actions[:, 0] == pytest.approx(np.arange(7) / 1e4)
    assert d.sha256 == "hash"


def test_a_file_without_successors_loses_the_rows_whose_successor_is_unknown(tmp_path):
    """Timeout row 5 and the last row go; terminal row 2 gets itself, never row 3, the next episode's first."""
    d = read_tiny(tmp_path, 8, [2], [5], False)
    assert d.obs[:, 0].tolist() == [0, 10, 20, 30, 40, 60]
    assert d.next_obs[:, 0].tolist() == [10, 20, 20, 40, 50, 70]
    assert d.rewards.tolist() == [1, 2, 3, 4, 5, 7]
    assert d.actions[:, 0] == pytest.approx([0, 1e-4, 2e-4, 3e-4, 4e-4, 6e-4])
    assert d.terminations.tolist() == [0, 0, 1, 0, 0, 0]
    assert d.ends.tolist() == [False, False, True, False, True, False]  # row 4 ends the second episode now


def test_the_last_row_stays_if_it_is_terminal(tmp_path):
    d = read_tiny(tmp_path, 4, [1, 3], [], False)
    assert d.obs[:, 0].tolist() == [0, 10, 20, 30]
    assert d.next_obs[:, 0].tolist() == [10, 10, 30, 30]
    assert d.ends.tolist() == [False, True, False, True]


def test_the_last_row_as_a_timeout_ends_the_episode_before_it(tmp_path):
    d = read_tiny(tmp_path, 4, [1], [3], False)
    assert d.obs[:, 0].tolist() == [0, 10, 20]
    assert d.next_obs[:, 0].tolist() == [10, 10, 30]
    assert d.ends.tolist() == [False, True, True]


def test_a_row_flagged_terminal_and_timeout_is_terminal(tmp_path):
    d = read_tiny(tmp_path, 4, [1, 3], [1], False)
    assert d.obs[:, 0].tolist() == [0, 10, 20, 30]
    assert d.next_obs[:, 0].tolist() == [10, 10, 30, 30]
    assert d.terminations.tolist() == [0, 1, 0, 1]


def test_an_episode_of_one_dropped_row_leaves_no_trace(tmp_path):
    """Rows 2 and 3 are timeouts: row 3 was an episode by itself. Row 1 ends the first, row 4 goes on."""
    d = read_tiny(tmp_path, 7, [6], [2, 3], False)
    assert d.obs[:, 0].tolist() == [0, 10, 40, 50, 60]
    assert d.next_obs[:, 0].tolist() == [10, 20, 50, 60, 60]
    assert d.ends.tolist() == [False, True, False, False, True]


def test_without_timeouts_episodes_are_cut_at_the_step_limit(tmp_path):
    """Terminal at row 500; 1,000 rows later, at row 1,500, the limit; 502 rows remain unfinished."""
    d = read_tiny(tmp_path, 2_003, [500], None, True)
    assert len(d.obs) == 2_003
    assert np.flatnonzero(d.ends).tolist() == [500, 1_500]
    assert np.flatnonzero(d.terminations).tolist() == [500]
    d = read_tiny(tmp_path, 2_003, [500], None, False)
    assert len(d.obs) == 2_001
    assert np.flatnonzero(d.ends).tolist() == [500, 1_499]
    assert d.obs[1_499:1_501, 0].tolist() == [14_990, 15_010]  # row 1,500 is gone
    assert d.next_obs[1_499, 0] == 15_000


def test_a_terminal_on_the_last_allowed_step_stays_one_and_restarts_the_count(tmp_path):
    """Limit 2: rows (0, 1 terminal), (2, 3 cut), (4 unfinished)."""
    d = read_tiny(tmp_path, 5, [1], None, True, limit=2)
    assert d.terminations.tolist() == [0, 1, 0, 0, 0]
    assert d.ends.tolist() == [False, True, False, True, False]


def test_successors_that_are_not_known_are_marked(tmp_path):
    """Terminal rows of files without successors; all of them are known where the file has them."""
    assert read_tiny(tmp_path, 8, [2], [5], True).known.all()
    assert read_tiny(tmp_path, 8, [2, 7], [5], False).known.tolist() == [
        True,
        True,
        False,
        True,
        True,
        True,
        False,
    ]


def test_an_ant_walks_on_from_its_goal(tmp_path):
    """The next row within 1 m is the successor of a terminal one; after a jump, a timeout or at the end it is not."""
    arrays = tiny(8, [1, 3, 5, 7], [5], False)
    place = np.array([0.0, 0.2, 0.9, 1.5, 9.0, 9.1, 9.2, 9.3], np.float32)
    arrays["observations"] = np.stack([place, 0 * place], 1)
    ant = replace(TINY, name="antmaze-umaze-v2", obs_dim=2)
    d = data.read_d4rl(write(tmp_path / "ant.hdf5", arrays), ant, "")
    assert d.known.tolist() == [True, True, True, False, True, False, True, False]
    assert d.next_obs[:, 0].tolist() == place[[1, 2, 3, 3, 5, 5, 7, 7]].tolist()


@pytest.mark.parametrize("flags", ["<f4", "f8", "i1", "u8", "i8", "column"])
def test_other_number_types_and_columns_are_read_as_float32(flags, tmp_path):
    """float64 observations, flags as numbers, (N, 1) rewards and flags, big-endian actions."""
    plain = tiny(6, [2], [4], True)
    odd = {k: v.astype(">f8") for k, v in plain.items() if v.dtype != bool}
    odd["rewards"] = odd["rewards"][:, None]
    for k in ("terminals", "timeouts"):
        odd[k] = plain[k][:, None] if flags == "column" else plain[k].astype(flags)
    a = data.read_d4rl(write(tmp_path / "a.hdf5", plain), TINY, "")
    b = data.read_d4rl(write(tmp_path / "b.hdf5", odd), TINY, "")
    for x, y in zip(a[:6], b[:6], strict=True):
        assert x.dtype == y.dtype == (bool if x is a.ends else np.float32)
        assert np.array_equal(x, y)
    assert b.rewards.tolist() == [1, 2, 3, 4, 5, 6] and b.terminations.tolist() == [0, 0, 1, 0, 0, 0]


def test_compressed_chunked_files_are_read(tmp_path):
    arrays = good(50)
    d = data.load(HOPPER, write(tmp_path / "z.hdf5", arrays, chunks=True, compression="gzip", shuffle=True))
    assert np.array_equal(d.obs, arrays["observations"])
    assert np.array_equal(d.next_obs, arrays["next_observations"])
    assert d.sha256 == hashlib.sha256((tmp_path / "z.hdf5").read_bytes()).hexdigest()


def test_other_arrays_in_the_file_do_not_matter(tmp_path):
    path = write(tmp_path / "extra.hdf5", good())
    with h5py.File(path, "a") as f:
        f["infos/qpos"] = np.full((3, 2), np.nan)
        f["metadata/algorithm"] = "SAC"
        f.attrs["note"] = "text"
    assert len(data.load(HOPPER, path).obs) == 8


def test_actions_a_rounding_error_outside_the_box_are_clipped(tmp_path):
    arrays = good(3)
    arrays["actions"][0, 0], arrays["actions"][1, 1] = 1.0005, -1.0005
    d = data.load(HOPPER, write(tmp_path / "a.hdf5", arrays))
    assert d.actions[0, 0] == 1 and d.actions[1, 1] == -1


def test_episode_returns_count_finished_episodes_only(tmp_path):
    """1+2+3 and 4+5; rows 6 and 7 never end. Without any end: the rows there are, 1+...+4."""
    assert read_tiny(tmp_path, 7, [2], [4], True).episode_returns().tolist() == [6, 9]
    assert read_tiny(tmp_path, 5, [2, 4], [], True).episode_returns().tolist() == [6, 9]
    assert read_tiny(tmp_path, 8, [2], [5], False).episode_returns().tolist() == [6, 9]  # row 5 is dropped
    assert read_tiny(tmp_path, 4, [], [], True).episode_returns().tolist() == [10]


def test_moments_are_mean_and_population_std_plus_a_thousandth(tmp_path):
    """Observations 0, 10, 20: mean 10, std sqrt(200 / 3)."""
    mean, std = read_tiny(tmp_path, 3, [], [], True).moments()
    assert mean.dtype == std.dtype == np.float32 and mean.shape == std.shape == (1,)
    assert mean.tolist() == [10] and std[0] == pytest.approx((200 / 3) ** 0.5 + 1e-3, rel=1e-6)


def test_moments_do_not_lose_digits_on_long_files():
    """Columns of float32 summed row by row in float32 would lose the second digit of the std, 0.5."""
    n = 400_000
    x = np.where(np.arange(n) % 2, 1_000.5, 999.5).astype(np.float32)[:, None].repeat(3, 1)
    empty = np.zeros(n, np.float32)
    mean, std = data.Dataset(x, x, empty, x, empty, empty > 0, empty < 1, "", Path()).moments()
    assert mean == pytest.approx(1_000, abs=1e-3) and std == pytest.approx(0.501, abs=1e-6)


def test_batch_transforms_copies(tmp_path):
    """r -> 10 r - 5; s -> (s - 10) / 4 for both ends of the transition; the dataset stays raw."""
    d = read_tiny(tmp_path, 3, [1], [], True)
    batch = d.batch(data.Units(10.0, -5.0, (np.array([10], np.float32), np.array([4], np.float32))))
    assert batch.rewards.tolist() == [5, 15, 25]
    assert batch.obs[:, 0].tolist() == [-2.5, 0, 2.5]
    assert batch.next_obs[:, 0].tolist() == [-1.25, 1.25, 3.75]
    assert batch.actions[:, 0].tolist() == pytest.approx([0, 1e-4, 2e-4])
    assert batch.terminations.tolist() == [0, 1, 0]
    assert all(x.dtype == torch.float32 for x in batch)
    assert d.rewards.tolist() == [1, 2, 3]
    assert d.obs[:, 0].tolist() == [0, 10, 20] and d.next_obs[:, 0].tolist() == [5, 15, 25]
    plain = d.batch()
    assert plain.rewards.tolist() == [1, 2, 3] and plain.obs[:, 0].tolist() == [0, 10, 20]


def test_batch_is_float32_for_a_numpy_scale_too(tmp_path):
    """What is computed from `episode_returns()` is a NumPy float64, which widens a float32 array (NumPy 2)."""
    d = read_tiny(tmp_path, 5, [2, 4], [], True)  # returns 6 and 9
    returns = d.episode_returns()
    batch = d.batch(data.Units(1_000 / (returns.max() - returns.min())))
    assert batch.rewards.tolist() == pytest.approx([1000 / 3, 2000 / 3, 1000, 4000 / 3, 5000 / 3])
    assert batch.rewards.dtype == torch.float32


# ---- 3: refusals ----


def test_a_missing_file_is_refused(tmp_path):
    refusal(tmp_path / "none.hdf5")
    refusal(tmp_path)


def test_a_broken_installation_is_refused(tmp_path, monkeypatch):
    """The embedded file is never downloaded."""
    monkeypatch.setattr(data, "EMBEDDED", tmp_path)
    with pytest.raises(UsageError, match=r"hopper-mini-v0\.hdf5"):
        data.load("hopper-mini-v0")


def test_the_embedded_dataset_needs_no_download(monkeypatch):
    """Complete, small, and every successor inside an episode is the next row."""
    monkeypatch.setenv("D4RL_URL", "http://127.0.0.1:1")
    d, task = data.load("hopper-mini-v0"), data.TASKS["hopper-mini-v0"]
    assert len(d.obs) == task.rows and task.path.stat().st_size == task.size <= 8e6
    assert d.sha256 == task.sha256 == hashlib.sha256(task.path.read_bytes()).hexdigest()
    inside = ~d.ends[:-1]
    assert np.array_equal(d.next_obs[:-1][inside], d.obs[1:][inside])
    assert 20 < d.ends.sum() < len(d.obs) / 5 and -10 < task.score(d.episode_returns().mean()) < 100


@pytest.mark.parametrize(
    "content", [b"", b"observations,actions\n1,2\n" * 100, b"\x89HDF\r\n\x1a\n", b"\0" * 9999]
)
def test_a_file_that_is_not_hdf5_is_refused(content, tmp_path):
    path = tmp_path / "not.hdf5"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("options", [{}, {"chunks": (16, 11), "compression": "gzip"}])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_a_file_cut_off_is_refused(share, options, tmp_path):
    """At the end, as an interrupted copy; and with bytes missing from the middle."""
    path = write(tmp_path / "cut.hdf5", {"observations": good(200)["observations"]}, **options)
    with h5py.File(path, "a") as f:
        for k, v in good(200).items():
            if k != "observations":
                f[k] = v
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    refusal(path)
    at = int(share * len(raw))
    path.write_bytes(raw[: at - 20] + raw[at:])
    refusal(path)


@pytest.mark.parametrize(
    "key", ["observations", "actions", "rewards", "terminals", "timeouts", "next_observations"]
)
def test_damaged_compressed_chunks_are_refused(key, tmp_path):
    """The file opens, its tree is whole; only inflating the rows fails."""
    path = write(tmp_path / "z.hdf5", good(200), chunks=True, compression="gzip")
    with h5py.File(path) as f:
        chunk = f[key].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    middle = chunk.byte_offset + chunk.size // 2
    raw[chunk.byte_offset + 2 : middle] = b"\xff" * (middle - chunk.byte_offset - 2)
    path.write_bytes(raw)
    with h5py.File(path) as f:
        assert f[key].shape[0] == 200
    refusal(path)


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_a_missing_array_is_refused(key, tmp_path):
    arrays = good()
    del arrays[key]
    assert f"no '{key}'" in refusal(write(tmp_path / "x.hdf5", arrays))


@pytest.mark.parametrize(
    "key, shape",
    [
        ("observations", (8, 17)), ("observations", (8,)), ("observations", (8, 11, 1)), ("observations", (8, 0)),
        ("next_observations", (8, 17)), ("next_observations", (1, 8, 11)), ("actions", (8, 6)), ("actions", (8,)),
        ("actions", (8, 3, 1)), ("rewards", (8, 2)), ("rewards", (8, 1, 1)), ("rewards", (8, 0)), ("rewards", ()),
        ("terminals", (8, 3)), ("terminals", (2, 2, 2)), ("timeouts", (8, 2)), ("timeouts", ()),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_refused(key, shape, tmp_path):
    message = refusal(write(tmp_path / "x.hdf5", good() | {key: np.zeros(shape, np.float32)}))
    assert f"'{key}'" in message
    if shape == (8, 17):
        assert "(8, 17)" in message and "11" in message
    if shape == (8, 6):
        assert "(8, 6)" in message and "3" in message


@pytest.mark.parametrize(
    "key", ["observations", "actions", "rewards", "terminals", "timeouts", "next_observations"]
)
def test_differing_row_counts_are_refused(key, tmp_path):
    arrays = good(8)
    arrays[key] = arrays[key][:7]
    message = refusal(write(tmp_path / "x.hdf5", arrays))
    assert "7" in message and "8" in message


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_with_their_count_and_place(key, value, tmp_path):
    """Rows 3, 5 and 6 are bad: three, the first is 3."""
    arrays = good(8)
    for row in (3, 5, 6):
        arrays[key][row, ...] = value
    message = refusal(write(tmp_path / "x.hdf5", arrays))
    assert f"3 rows of '{key}'" in message and "first 3" in message


def test_numbers_beyond_float32_are_refused_in_one_line(tmp_path):
    """1e300 is finite in the file and infinite for us; NumPy's overflow warning is not part of the answer."""
    arrays = good(8)
    arrays["rewards"] = arrays["rewards"].astype(np.float64)
    arrays["rewards"][2] = 1e300
    message = refusal(write(tmp_path / "x.hdf5", arrays))
    assert "1 rows of 'rewards'" in message and "first 2" in message


@pytest.mark.parametrize("key", ["terminals", "timeouts"])
def test_nan_flags_are_refused(key, tmp_path):
    """NaN > 0.5 is false: a damaged flag would silently join two episodes."""
    arrays = good(8)
    arrays[key] = arrays[key].astype(np.float32)
    arrays[key][4] = np.nan
    assert key in refusal(write(tmp_path / "x.hdf5", arrays))


@pytest.mark.parametrize("value", [5.0, -5.0, 1.01])
def test_actions_outside_the_box_are_refused(value, tmp_path):
    arrays = good(8)
    arrays["actions"][4, 1] = value
    assert f"{abs(value):.3g}" in refusal(write(tmp_path / "x.hdf5", arrays))


@pytest.mark.parametrize("rows", [0, 1])
def test_a_file_of_no_or_one_row_is_refused(rows, tmp_path):
    refusal(write(tmp_path / "x.hdf5", {k: v[:rows] for k, v in good().items()}))


def test_a_file_whose_rows_are_all_dropped_is_refused(tmp_path):
    """Two rows without successors, neither terminal: one is left, and no batch can be drawn from it."""
    arrays = good(2) | {"terminals": np.zeros(2, bool)}
    del arrays["next_observations"]
    refusal(write(tmp_path / "x.hdf5", arrays))


def _strings(f: h5py.File, k: str) -> None:
    f.create_dataset(k, data=np.array([b"1.0"] * 8))


def _texts(f: h5py.File, k: str) -> None:
    f.create_dataset(k, data=["1.0"] * 8, dtype=h5py.string_dtype())


def _group(f: h5py.File, k: str) -> None:
    f.create_group(k)["values"] = np.zeros(8)


def _null(f: h5py.File, k: str) -> None:
    f.create_dataset(k, data=h5py.Empty("f4"))


def _type(f: h5py.File, k: str) -> None:
    f[k] = np.dtype("f4")


def _complex(f: h5py.File, k: str) -> None:
    f[k] = np.zeros((8, 11), np.complex64)


def _compound(f: h5py.File, k: str) -> None:
    f[k] = np.zeros(8, [("a", "f4"), ("b", "f4")])


def _ragged(f: h5py.File, k: str) -> None:
    f.create_dataset(k, shape=(8,), dtype=h5py.vlen_dtype("f4"))


def _references(f: h5py.File, k: str) -> None:
    f.create_dataset(k, data=np.array([f.ref] * 8, dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)


def _dangling(f: h5py.File, k: str) -> None:
    f[k] = h5py.SoftLink("/nowhere")


def _loop(f: h5py.File, k: str) -> None:
    f[k] = h5py.SoftLink(f"/{k}")


def _elsewhere(f: h5py.File, k: str) -> None:
    f[k] = h5py.ExternalLink("no_such_file.hdf5", "/x")


def _huge(f: h5py.File, k: str) -> None:
    f.create_dataset(k, shape=(2**45, 11), chunks=(8, 11), dtype="f4")  # 1.4 PiB, nothing of it written


def _endless(f: h5py.File, k: str) -> None:
    f.create_dataset(k, shape=(2**62,), chunks=(8,), dtype="f4")


ODD = [_strings, _texts, _group, _null, _type, _complex, _compound, _ragged, _references, _dangling, _loop,
       _elsewhere, _huge, _endless]  # fmt: skip


def test_claims_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    """10^9 rows, of which none is written: by shape, by number of rows, by memory."""
    rows, path = 10**9, tmp_path / "x.hdf5"
    widths = {"observations": (11,), "actions": (3,), "rewards": (), "terminals": ()}

    def refused(**changed: tuple) -> str:
        with h5py.File(path, "w") as f:
            for k, width in widths.items():
                shape = changed.get(k, (rows, *width))
                f.create_dataset(k, shape=shape, chunks=(8, *shape[1:]), dtype="f4")
        return refusal(path)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", None)
    assert "'terminals' of shape (1000000000, 3)" in refused(terminals=(rows, 3))
    assert "the same number of rows" in refused(terminals=(8,))
    assert "1000000000 rows, 59.6 GiB" in refused()


@pytest.mark.parametrize("odd", ODD, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("key", ["observations", "rewards", "timeouts"])
def test_an_object_that_is_no_array_of_numbers_is_refused(odd, key, tmp_path):
    arrays = good(8)
    del arrays[key]
    path = write(tmp_path / "x.hdf5", arrays)
    with h5py.File(path, "a") as f:
        odd(f, key)
    refusal(path)


def outcome(path: Path) -> str:
    """What reading `path` comes to: 'rows', 'refused', or the name of an exception that is a bug."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            d = data.load(HOPPER, path)
    except UsageError as e:
        return "refused" if len(str(e).splitlines()) == 1 else "a refusal of two lines"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    n = len(d.obs)
    shapes = [(n, 11), (n, 3), (n,), (n, 11), (n,)]
    fine = all(x.shape == s and x.dtype == np.float32 for x, s in zip(d[:5], shapes, strict=True))
    fine &= all(np.isfinite(x).all() for x in d[:5]) and np.abs(d.actions).max() <= 1
    fine &= bool(np.isin(d.terminations, (0, 1)).all()) and d.ends.shape == (n,) and d.ends.dtype == bool
    return "rows" if fine and n > 1 else "a dataset with something wrong in it"


def test_random_trees_are_read_or_refused(tmp_path):
    """200 files, each array at random right, gone, misshapen, mistyped, not finite or not an array at all."""
    path, found = tmp_path / "x.hdf5", {}
    for seed in range(200):
        rng = random.Random(seed)
        n = rng.choice([8, 8, 8, 8, 2, 1, 0])
        with h5py.File(path, "w") as f:
            for k, v in good(n, seed).items():
                damage = rng.choice(["none"] * 16 + ["gone", "shape", "type", "rows", "value", "odd"])
                if damage == "odd":
                    rng.choice(ODD)(f, k)
                elif damage == "shape":
                    f[k] = np.zeros(rng.choice([(), (n, 1), (n, 12), (n, 3, 1), (1, n), (n, 0)]), np.float32)
                elif damage == "type":
                    f[k] = v.astype(rng.choice(["f2", "f8", ">f4", "i1", "u8", "S4", "c16", "?"]))
                elif damage == "rows":
                    f[k] = np.repeat(v, 2, 0)
                elif damage == "value":
                    v = v.astype(np.float64)
                    v[: rng.randint(0, n)] = rng.choice([np.nan, np.inf, 1e300, 7.0, -1.5, 1e-320])
                    f[k] = v
                elif damage == "none":
                    f[k] = v
        result = outcome(path)
        found.setdefault(result, []).append(seed)
    assert set(found) == {"rows", "refused"}, found
    assert min(map(len, found.values())) >= 20  # both happen


def test_random_bytes_in_the_file_s_tree_are_read_or_refused(tmp_path):
    """Bit rot in the first 4 KiB, where the names and types of the arrays are."""
    raw, found = write(tmp_path / "ok.hdf5", good(40)).read_bytes(), {}
    path = tmp_path / "x.hdf5"
    for seed in range(200):
        rng, rotten = random.Random(seed), bytearray(raw)
        for _ in range(rng.choice([1, 3])):
            rotten[rng.randrange(4_096)] = rng.randrange(256)
        path.write_bytes(rotten)
        found.setdefault(outcome(path), []).append(seed)
    assert set(found) == {"rows", "refused"}, found


# ---- 4: downloads ----


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for hopper-medium-v2's file: `body` is right, `reply(handler)` may be replaced."""
    body = write(tmp_path / "published.hdf5", good(30)).read_bytes()

    def whole_file(handler: BaseHTTPRequestHandler, content: bytes = body) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            this.hits.append(self.path)
            this.reply(self)

        def log_message(self, *_) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    this = SimpleNamespace(hits=[], body=body, whole_file=whole_file, reply=whole_file)
    this.folder = tmp_path / "some" / "cache"
    this.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    this.path = this.folder / "hopper_medium-v2.hdf5"
    this.listing = lambda: sorted(p.name for p in this.folder.glob("*"))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("D4RL_URL", this.url + "/d4rl")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(this.folder))
    monkeypatch.setenv("no_proxy", "*")
    task = replace(data.TASKS[HOPPER], size=len(body), sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(data.TASKS, HOPPER, task)
    yield this
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def download_refusal() -> str:
    """The one line with which loading hopper-medium-v2 is refused."""
    with pytest.raises(UsageError) as e:
        data.load(HOPPER)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def test_a_file_is_downloaded_once(server):
    d = data.load(HOPPER)
    assert np.array_equal(d.obs, good(30)["observations"])
    assert d.sha256 == hashlib.sha256(server.body).hexdigest()
    assert server.hits == ["/d4rl/gym_mujoco_v2/hopper_medium-v2.hdf5"]
    assert server.listing() == ["hopper_medium-v2.hdf5"] and server.path.read_bytes() == server.body
    again = data.load(HOPPER)
    assert len(server.hits) == 1 and np.array_equal(again.obs, d.obs)


def test_a_dataset_of_one_s_own_is_never_downloaded(server, tmp_path):
    assert len(data.load(HOPPER, write(tmp_path / "own.hdf5", good(5))).obs) == 5
    assert server.hits == []


def test_the_leftover_of_a_killed_download_is_no_obstacle(server):
    server.folder.mkdir(parents=True)
    (server.folder / "hopper_medium-v2.hdf5.part").write_bytes(b"half" * 10_000)
    assert len(data.load(HOPPER).obs) == 30
    assert server.path.read_bytes() == server.body
    assert set(server.listing()) <= {"hopper_medium-v2.hdf5", "hopper_medium-v2.hdf5.part"}


def test_a_download_with_the_wrong_hash_is_refused(server):
    wrong = bytes([*server.body[:-1], server.body[-1] ^ 1])
    server.reply = lambda handler: server.whole_file(handler, wrong)
    message = download_refusal()
    assert hashlib.sha256(wrong).hexdigest() in message and hashlib.sha256(server.body).hexdigest() in message
    assert server.listing() == []


def test_a_download_of_the_wrong_size_is_refused(server):
    """A log-in page instead of the file, answered with 200."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"<html>please log in</html>")

    server.reply = page
    assert str(len(server.body)) in download_refusal()
    assert server.listing() == []


def test_a_download_cut_off_is_refused(server):
    """Half the announced bytes, then the connection is closed in good order."""
    server.reply = lambda handler: server.whole_file(handler, server.body[: len(server.body) // 2])
    download_refusal()
    assert server.listing() == []


def test_a_download_whose_connection_breaks_is_refused(server):
    def reset(handler: BaseHTTPRequestHandler) -> None:
        server.whole_file(handler, server.body[:100])
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()  # RST instead of FIN

    server.reply = reset
    download_refusal()
    assert server.listing() == []


def test_after_a_failure_the_next_attempt_succeeds(server):
    server.reply = lambda handler: server.whole_file(handler, server.body[:100])
    download_refusal()
    server.reply = server.whole_file
    assert len(data.load(HOPPER).obs) == 30


def test_a_file_that_is_not_there_is_refused_with_advice(server):
    server.reply = lambda handler: handler.send_error(404)
    message = download_refusal()
    assert server.url + "/d4rl/gym_mujoco_v2/hopper_medium-v2.hdf5" in message
    assert str(server.path) in message and "hopper-mini-v0" in message
    assert server.listing() == []


def test_no_server_is_refused_with_advice(server, monkeypatch):
    with socket.socket() as s:  # a port that nobody listens on
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    monkeypatch.setenv("D4RL_URL", url)
    message = download_refusal()
    assert url + "/gym_mujoco_v2/hopper_medium-v2.hdf5" in message
    assert str(server.path) in message and "hopper-mini-v0" in message
    assert server.listing() == []


def test_a_server_that_does_not_speak_http_is_refused_with_advice(server):
    """An SSH server on that port: what it says must not break the line."""
    server.reply = lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    assert str(server.path) in download_refusal()
    assert server.listing() == []


def test_a_server_that_announces_no_number_is_refused_or_measured(server):
    """`Content-Length: abc`: the file itself is right."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "abc")
        handler.end_headers()
        handler.wfile.write(server.body)

    server.reply = reply
    try:
        assert len(data.load(HOPPER).obs) == 30
    except UsageError:
        assert server.listing() == []


@pytest.mark.parametrize(
    "url",
    ["mirror.example.org", "", "http://[::1", "http://" + "a" * 70],
    ids=["no scheme", "empty", "half an address", "too long a name"],
)
def test_a_base_url_that_is_none_is_refused_with_advice(url, server, monkeypatch):
    """$D4RL_URL without a scheme, empty, or mistyped. (Empty may also mean D4RL's own host: then look there.)"""
    monkeypatch.setenv("D4RL_URL", url)
    monkeypatch.setattr(data, "D4RL_URL", "http://127.0.0.1:1")
    assert str(server.path) in download_refusal()
    assert server.listing() == []


@pytest.mark.usefixtures("server")
def test_a_dataset_folder_that_is_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file"))
    assert str(tmp_path / "file") in download_refusal()
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_damaged_file_in_the_cache_is_refused_by_its_hash(server):
    """One byte of the rows: h5py would read it without a word."""
    data.load(HOPPER)
    damaged = bytearray(server.body)
    damaged[-5] ^= 1
    server.path.write_bytes(damaged)
    message = download_refusal()
    assert str(server.path) in message and hashlib.sha256(damaged).hexdigest() in message
    assert len(server.hits) == 1 and server.path.read_bytes() == damaged  # the user's file is not touched


def test_a_short_file_in_the_cache_is_refused_by_its_size(server):
    server.folder.mkdir(parents=True)
    server.path.write_bytes(server.body[:-10])
    message = download_refusal()
    assert str(server.path) in message and str(len(server.body) - 10) in message
    assert server.hits == []


def test_two_runs_started_together_both_get_the_file(server):
    """Several seeds at once on a fresh machine: the second transfer ends after the first file is in place."""
    second, lock, order = threading.Event(), threading.Lock(), []

    def reply(handler: BaseHTTPRequestHandler) -> None:
        with lock:
            order.append(handler)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(server.body)))
        handler.end_headers()
        handler.wfile.flush()
        if handler is order[0]:
            second.wait(1)
            threading.Event().wait(0.2)  # the second has opened its file by now
        else:
            second.set()
            for _ in range(200):
                if server.path.exists():
                    break
                threading.Event().wait(0.01)
        handler.wfile.write(server.body)

    server.reply = reply
    results: list[object] = []

    def load() -> None:
        try:
            results.append(len(data.load(HOPPER).obs))
        except Exception as e:
            results.append(repr(e))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [30, 30]
    assert server.listing() == ["hopper_medium-v2.hdf5"] and server.path.read_bytes() == server.body


# ---- 5: the buffer ----


def rows(first: int, n: int) -> Batch:
    """Row i: observation (i, -i), action i / 100, reward 10 i, successor (i + 0.5, -i), terminal if i % 3 == 0."""
    i = torch.arange(first, first + n, dtype=torch.float32)
    return Batch(
        torch.stack([i, -i], 1), i[:, None] / 100, 10 * i, torch.stack([i + 0.5, -i], 1), (i % 3 == 0).float()
    )


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


# ---- 6: the online environment ----


def test_a_time_limit_keeps_its_bootstrap_and_its_successor():
    """Five steps with rewards 1..5, stored as 2 r - 1; the last is cut by time: no termination, successor age 5."""
    buffer = ReplayBuffer(20, 2, 1, CPU)
    interaction = data.Interaction(Walk(limit=5), buffer, 0, data.Units(2.0, -1.0))
    results = [interaction.step(hold) for _ in range(7)]
    assert results[:4] == [None] * 4 and results[5:] == [None] * 2
    assert results[4] == {"train/episode_return": 15.0, "train/episode_length": 5}
    batch = buffer.take(torch.arange(7))
    assert batch.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.next_obs[:, 0].tolist() == [1, 2, 3, 4, 5, 1, 2]
    assert batch.terminations.tolist() == [0] * 7
    assert batch.rewards.tolist() == [1, 3, 5, 7, 9, 1, 3]
    assert torch.equal(batch.obs[1:5], batch.next_obs[:4]) and not torch.equal(
        batch.obs[5], batch.next_obs[4]
    )


@pytest.mark.parametrize("limit", [9, 3])
def test_a_terminal_is_stored_as_one_also_on_the_last_allowed_step(limit):
    buffer = ReplayBuffer(20, 2, 1, CPU)
    interaction = data.Interaction(Walk(limit=limit, fall=3), buffer, 0)
    results = [interaction.step(hold) for _ in range(4)]
    assert results[2] == {"train/episode_return": 6.0, "train/episode_length": 3}
    batch = buffer.take(torch.arange(4))
    assert batch.terminations.tolist() == [0, 0, 1, 0]
    assert batch.next_obs[:, 0].tolist() == [1, 2, 3, 1] and batch.rewards.tolist() == [1, 2, 3, 1]


def test_the_policy_sees_one_float32_row_and_its_action_is_stored():
    buffer, seen = ReplayBuffer(5, 2, 1, CPU), []

    def policy(obs: torch.Tensor) -> torch.Tensor:
        seen.append(obs.clone())
        return torch.tensor([[0.1 * len(seen)]])

    env = Walk()
    interaction = data.Interaction(env, buffer, 0)
    for _ in range(3):
        interaction.step(policy)
    assert all(x.shape == (1, 2) and x.dtype == torch.float32 for x in seen)
    assert torch.equal(torch.cat(seen), buffer.obs)
    assert buffer.take(torch.arange(3)).actions[:, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_reset_seeds_depend_on_seed_and_episode_alone():
    def seeds(seed: int, steps: int = 15) -> list[int]:
        env = Walk(limit=5)
        interaction = data.Interaction(env, ReplayBuffer(50, 2, 1, CPU), seed)
        for _ in range(steps):
            interaction.step(lambda obs: torch.rand(len(obs), 1))
        return env.seeds

    torch.manual_seed(0)
    a, b = seeds(0), seeds(1)
    torch.manual_seed(1)
    assert seeds(0) == a and seeds(1) == b
    assert len(set(a + b)) == 6


def play(env: gym.Env, actions: torch.Tensor, fixed: int, stop: int | None = None, stopped=None) -> tuple:
    """Play `actions`, action i at row i; up to step `stop`, or going on from what was `stopped` there."""
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    buffer = ReplayBuffer(fixed + len(actions), obs_dim, act_dim, CPU)
    buffer.extend(Batch(*(torch.ones(fixed, *x) for x in ((obs_dim,), (act_dim,), (), (obs_dim,), ()))))
    interaction, results = data.Interaction(env, buffer, 7, data.Units(0.5, 0.25)), []
    if stopped is not None:
        buffer.load_state_dict(stopped[0])
        interaction.load_state_dict(stopped[1])
    while len(buffer) - fixed < (stop or len(actions)):
        results.append(interaction.step(lambda _: actions[len(buffer) - fixed][None]))
    return buffer, interaction, results


def test_an_interrupted_episode_goes_on_as_if_nothing_had_happened(capsys):
    """Stop before every single step of three episodes, at their ends too; everything returned and stored agrees."""
    actions = torch.rand(17, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    straight, _, results = play(Walk(limit=6), actions, 3)
    for stop in range(1, 17):
        buffer, interaction, before = play(Walk(limit=6), actions, 3, stop)
        state = buffer.state_dict(), interaction.state_dict()
        resumed, _, after = play(Walk(limit=6), actions, 3, stopped=state)
        assert torch.equal(resumed.table, straight.table), stop
        assert before + after == results, stop
    assert "note:" not in capsys.readouterr().out


def test_an_interrupted_hopper_goes_on_bit_for_bit(capsys):
    """200 random steps of MuJoCo, about ten episodes; stopped in the middle of three of them."""
    actions = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    straight, _, results = play(envs.locomotion("Hopper-v4"), actions, 5)
    ends = [i for i, r in enumerate(results) if r is not None]
    assert len(ends) > 4
    for k in (0, 2, 4):
        stop = (ends[k] + ends[k + 1]) // 2
        buffer, interaction, before = play(envs.locomotion("Hopper-v4"), actions, 5, stop)
        state = buffer.state_dict(), interaction.state_dict()
        resumed, _, after = play(envs.locomotion("Hopper-v4"), actions, 5, stopped=state)
        assert torch.equal(resumed.obs, straight.obs) and torch.equal(resumed.table, straight.table)
        assert before + after == results
    assert "note:" not in capsys.readouterr().out


def test_a_simulator_that_does_not_repeat_itself_starts_the_next_episode(capsys):
    """Restored on another machine: the half episode stays stored, episode 1 follows, and the user is told."""
    actions = torch.zeros(8, 1)
    buffer, interaction, _ = play(Walk(limit=6), actions, 0, 4)
    state, env = (buffer.state_dict(), interaction.state_dict()), Walk(limit=6)
    env.drift = 1e-3
    resumed, interaction, results = play(env, actions, 0, stopped=state)
    assert "note:" in capsys.readouterr().out
    assert resumed.obs[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3] and results == [None] * 4
    assert interaction.episode == 1 and len(env.seeds) == 2 and env.seeds[0] != env.seeds[1]


def test_restoring_uses_no_random_number_of_the_run():
    actions = torch.zeros(8, 1)
    buffer, interaction, _ = play(Walk(limit=6), actions, 0, 4)
    before = torch.get_rng_state()
    interaction.load_state_dict(interaction.state_dict())
    assert torch.equal(torch.get_rng_state(), before) and len(buffer) == 4


# ---- 7: evaluation ----


class Lottery(Walk):
    """An episode whose seed decides how long it is and what a step pays."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, *_ = super().step(action)
        seed = self.seeds[-1]
        return obs, seed % 7 - 3.5, seed % 2 == 0 and self.age == 2 + seed % 5, self.age == 2 + seed % 5, {}


def lottery_task(built: list) -> data.Task:
    def make() -> gym.Env:
        built.append(Lottery())
        return built[-1]

    return data.Task("lottery", make, 2, 1, 10, -10.0, 30.0, "lottery.hdf5")


@pytest.mark.parametrize("threads", [1, 4])
def test_evaluation_is_raw_and_counts_each_episode_once(threads):
    """Six episodes of 2 + s % 5 steps that pay s % 7 - 3.5 each; score 100 (R + 10) / 40."""
    built, shapes = [], []

    def policy(obs: torch.Tensor) -> torch.Tensor:
        shapes.append((obs.shape, obs.dtype))
        return hold(obs)

    evaluator = data.Evaluator(lottery_task(built), 6, 0)
    evaluator.threads = threads
    result = evaluator(policy, CPU)
    seeds = [s for env in built for s in env.seeds]
    assert len(built) == 6 and len(set(seeds)) == 6
    expected = np.mean([(2 + s % 5) * (s % 7 - 3.5) for s in seeds])
    assert result["eval/return"] == pytest.approx(expected)
    assert result["eval/score"] == pytest.approx(100 * (expected + 10) / 40)
    assert result["eval/length"] == pytest.approx(np.mean([2 + s % 5 for s in seeds]))
    assert set(shapes) == {(torch.Size([6, 2]), torch.float32)}
    assert len(shapes) == max(2 + s % 5 for s in seeds)


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "pen-human-v1"])
def test_threads_do_not_change_an_evaluation(name):
    """A policy that shakes the robot: the same returns and lengths from one thread and from three."""
    task, results = data.TASKS[name], []
    for threads in (1, 3):
        evaluator = data.Evaluator(task, 5, 0)
        assert 1 <= evaluator.threads <= 5 and data.Evaluator(data.TASKS[HOPPER], 5, 0).threads == 1
        evaluator.threads = threads
        policy = lambda obs: torch.sin(40 * obs.sum(1, keepdim=True) + torch.arange(task.act_dim))  # noqa: E731
        results.append(evaluator(policy, CPU))
    assert results[0] == results[1]


def test_evaluation_repeats_its_start_states_and_never_meets_those_of_training():
    built: list = []
    evaluator = data.Evaluator(lottery_task(built), 20, 0)
    first, second = evaluator(hold, CPU), evaluator(hold, CPU)
    assert first == second and len(built) == 20
    assert all(len(env.seeds) == 2 and env.seeds[0] == env.seeds[1] for env in built)
    ours = {env.seeds[0] for env in built}
    online = Walk(limit=1)
    interaction = data.Interaction(online, ReplayBuffer(200, 2, 1, CPU), 0)
    for _ in range(200):
        interaction.step(hold)
    assert len(ours) == 20 and len(set(online.seeds)) == 200 and not ours & set(online.seeds)
    others: list = []
    data.Evaluator(lottery_task(others), 20, 1)(hold, CPU)
    assert not ours & {env.seeds[0] for env in others}


def test_evaluation_uses_no_random_number_of_the_run():
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    data.Evaluator(data.TASKS[HOPPER], 2, 0)(lambda obs: torch.zeros(len(obs), 3), CPU)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_evaluation_and_training_normalise_observations_with_the_dataset_s_constants():
    """Age 0, 1, 2, ... seen as (age - 1) / 2."""
    units = data.Units(moments=(np.array([1, 0], np.float32), np.array([2, 1], np.float32)))
    seen: list[float] = []

    def policy(obs: torch.Tensor) -> torch.Tensor:
        seen.append(obs[0, 0].item())
        return hold(obs)

    task = data.Task("walk", Walk, 2, 1, 5, 0.0, 1.0, "walk.hdf5")
    assert data.Evaluator(task, 1, 0, units)(policy, CPU)["eval/return"] == 15  # 1 + 2 + 3 + 4 + 5
    assert seen == [-0.5, 0, 0.5, 1, 1.5]
    buffer = ReplayBuffer(5, 2, 1, CPU)
    interaction = data.Interaction(data.make_env(task, units), buffer, 0, units)
    for _ in range(5):
        interaction.step(hold)
    batch = buffer.take(torch.arange(5))
    assert batch.obs[:, 0].tolist() == [-0.5, 0, 0.5, 1, 1.5]
    assert batch.next_obs[:, 0].tolist() == [0, 0.5, 1, 1.5, 2] and batch.rewards.tolist() == [1, 2, 3, 4, 5]


def test_evaluation_of_hopper_equals_stepping_the_episodes_one_by_one():
    """By hand: Gymnasium's own Hopper-v4, no wrapper of ours, actions clipped here, returns added up in order."""

    def policy(obs: torch.Tensor) -> torch.Tensor:  # by element, so that a batch and a row agree to the bit
        return 3.0 * obs[:, 5:8] - obs[:, 1:4]  # well outside the box at times

    task = data.TASKS[HOPPER]
    result = data.Evaluator(task, 3, 4)(policy, CPU)
    returns, lengths = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make("Hopper-v4")
        for episode in range(3):
            obs, _ = env.reset(seed=envs.episode_seed(4, "eval", episode))
            total, steps, over = 0.0, 0, False
            while not over:
                x = torch.tensor(obs, dtype=torch.float32)[None]
                obs, reward, terminated, truncated, _ = env.step(policy(x)[0].numpy().clip(-1, 1))
                total, steps, over = total + reward, steps + 1, terminated or truncated
            returns.append(total)
            lengths.append(steps)
    assert len(set(returns)) == 3
    assert result["eval/return"] == pytest.approx(sum(returns) / 3, rel=1e-12)
    assert result["eval/length"] == pytest.approx(sum(lengths) / 3)
    assert result["eval/score"] == pytest.approx(100 * (sum(returns) / 3 + 20.272305) / 3254.572305)


def test_an_environment_of_other_dimensions_is_no_task_s():
    task = data.Task("walk", Walk, 3, 1, 5, 0.0, 1.0, "walk.hdf5")
    with pytest.raises(AssertionError, match="walk"):
        data.make_env(task)


# ---- 8: environments ----


@pytest.mark.parametrize("env_id", ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4"])
def test_actions_are_clipped_before_their_cost_is_charged(env_id, tmp_path, monkeypatch):
    """Action 5 everywhere is action 1 everywhere, in motion and in reward; unclipped it would cost 25 times as much."""

    monkeypatch.chdir(tmp_path)  # the stock HalfCheetah below writes MUJOCO_LOG.TXT

    def first(value: float, env: gym.Env) -> tuple[np.ndarray, float]:
        env.reset(seed=0)
        obs, reward, *_ = env.step(np.full(env.action_space.shape, value, np.float32))
        return obs, reward

    env = envs.locomotion(env_id)
    one, five, minus = (first(x, env) for x in (1.0, 5.0, -5.0))
    assert np.array_equal(one[0], five[0]) and one[1] == five[1]
    assert np.array_equal(minus[0], first(-1.0, env)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = first(5.0, gym.make(env_id))
    weight = 0.1 if env_id == "HalfCheetah-v4" else 1e-3
    assert one[1] - stock[1] == pytest.approx(weight * 24 * env.action_space.shape[0], rel=1e-6)


@pytest.mark.parametrize(
    "name", ["hopper-medium-v2", "halfcheetah-random-v2", "walker2d-expert-v2", "hopper-mini-v0"]
)
def test_building_and_stepping_is_silent_and_leaves_no_files(name, tmp_path, monkeypatch, capfd):
    """Neither Gymnasium's out-of-date notice nor MuJoCo's MUJOCO_LOG.TXT in the user's directory."""
    monkeypatch.chdir(tmp_path)
    before, handler = mujoco.get_mju_user_warning(), print
    mujoco.set_mju_user_warning(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = data.make_env(data.TASKS[name])
        env.reset(seed=0)
        for _ in range(5):
            env.step(np.full(env.action_space.shape, 3.0, np.float32))
    assert mujoco.get_mju_user_warning() is handler  # other users of MuJoCo keep theirs
    mujoco.set_mju_user_warning(before)
    assert list(tmp_path.iterdir()) == []
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_the_tasks_are_version_4_with_a_limit_of_1000_steps():
    for name, task in data.TASKS.items():
        if not name.startswith(("hopper", "halfcheetah", "walker2d")):
            continue
        env = data.make_env(task)
        robot = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d"}[name.split("-")[0]]
        assert env.spec.id == f"{robot}-v4" and env.spec.max_episode_steps == task.limit == 1_000


def test_walker_s_right_foot_is_d4rl_s():
    """Friction 0.9, left 1.9: -v5 has 1.9 on both feet, and policies trained on D4RL's data fall on it."""
    model = envs.locomotion("Walker2d-v4").unwrapped.model
    assert model.geom("foot_geom").friction[0] == pytest.approx(0.9)
    assert model.geom("foot_left_geom").friction[0] == pytest.approx(1.9)


def test_hopper_is_paid_for_being_healthy_on_the_step_of_its_fall():
    """Speed + 1 - 1e-3 |a|^2 on -v2 and -v4; -v5 withholds the 1."""
    env = envs.locomotion("Hopper-v4")
    env.reset(seed=0)
    terminated = False
    while not terminated:
        before = env.unwrapped.data.qpos[0]
        _, reward, terminated, truncated, _ = env.step(np.ones(3, np.float32))
        assert not truncated
    speed = (env.unwrapped.data.qpos[0] - before) / env.unwrapped.dt
    assert reward == pytest.approx(speed + 1 - 3e-3)


def test_episode_seeds_are_fixed_and_do_not_collide():
    """Equal in every process and on every machine; apart across seeds, purposes and episodes."""
    keys = [(s, p, e) for s in range(10) for p in ("online", "eval", "random", "medium") for e in range(100)]
    seeds = [envs.episode_seed(*key) for key in keys]
    assert seeds == [envs.episode_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(type(s) is int and 0 <= s < 2**32 for s in seeds)


# ---- 9: collecting ----


def walk_rollout(max_steps: int | None = None, **env) -> dict[str, np.ndarray]:
    more = () if max_steps is None else (max_steps,)
    return collect.rollout(Walk(**env), lambda obs: [obs[0] / 10], 3, *more)


def test_a_rollout_has_true_successors_and_acts_on_what_it_sees():
    part = walk_rollout(limit=4)
    assert part["observations"][:, 0].tolist() == [0, 1, 2, 3]
    assert part["next_observations"][:, 0].tolist() == [1, 2, 3, 4]
    assert np.array_equal(part["observations"][1:], part["next_observations"][:-1])
    assert part["actions"][:, 0].tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert part["rewards"].tolist() == [1, 2, 3, 4]
    assert part["terminals"].tolist() == [False] * 4 and part["timeouts"].tolist() == [False] * 3 + [True]
    kinds = {k: v.dtype.kind for k, v in part.items()}
    assert kinds == {k: "b" if k in ("terminals", "timeouts") else "f" for k in collect.FIELDS}
    assert all(v.dtype.itemsize == 4 for v in part.values() if v.dtype.kind == "f")


@pytest.mark.parametrize(
    "env, max_steps, length, terminal, timeout",
    [
        (dict(limit=9, fall=3), None, 3, True, False),  # a fall
        (
            dict(limit=3, fall=3),
            None,
            3,
            False,
            True,
        ),  # a fall on the last allowed step: D4RL stores a timeout
        (dict(limit=9), 3, 3, False, True),  # cut by us
        (dict(limit=9, fall=3), 3, 3, True, False),  # falls where we would have cut
        (dict(limit=9, fall=3), 5, 3, True, False),
        (dict(limit=9), 1, 1, False, True),
    ],
)
def test_how_a_rollout_ends(env, max_steps, length, terminal, timeout):
    part = walk_rollout(max_steps, **env)
    assert len(part["rewards"]) == length
    assert (bool(part["terminals"][-1]), bool(part["timeouts"][-1])) == (terminal, timeout)
    assert not part["terminals"][:-1].any() and not part["timeouts"][:-1].any()
    assert part["next_observations"][-1, 0] == length


def test_concatenate_and_whole():
    """Episodes of 3, 4 and 3 rows, cut at 8: the third has one row left, and `whole` drops it."""
    parts = [walk_rollout(limit=3), walk_rollout(limit=4), walk_rollout(limit=9, fall=3)]
    joined = collect.concatenate(parts)
    assert joined["rewards"].tolist() == [1, 2, 3, 1, 2, 3, 4, 1, 2, 3]
    assert np.flatnonzero(joined["timeouts"]).tolist() == [2, 6]
    assert np.flatnonzero(joined["terminals"]).tolist() == [9]
    cut = collect.concatenate(parts, 8)
    assert {len(v) for v in cut.values()} == {8}
    assert {len(v) for v in collect.whole(cut).values()} == {7}
    assert {len(v) for v in collect.whole(joined).values()} == {10}
    assert {len(v) for v in collect.whole(collect.concatenate(parts, 2)).values()} == {0}


def test_thin_takes_whole_episodes_evenly():
    """Four episodes of 5, at most 10 rows: after 5, 10, 15, 20 rows seen at most 2.5, 5, 7.5, 10 may be kept."""
    parts = [walk_rollout(limit=5) for _ in range(4)]
    for i, p in enumerate(parts):
        p["rewards"][:] = i
    data_of_four = collect.concatenate(parts)
    assert collect.thin(data_of_four, 10)["rewards"].tolist() == [1] * 5 + [3] * 5
    assert collect.thin(data_of_four, 20)["rewards"].tolist() == data_of_four["rewards"].tolist()
    assert len(collect.thin(data_of_four, 14)["rewards"]) == 10


def test_thin_to_less_than_an_episode_is_a_usage_error_or_nothing():
    """`--quality medium-replay --rows 500` where each episode has 1,000."""
    with contextlib.suppress(UsageError):
        assert len(collect.thin(walk_rollout(limit=5), 3)["rewards"]) <= 3


@pytest.fixture(scope="module")
def random_file(tmp_path_factory) -> Path:
    """500 rows as the command line makes them."""
    folder = tmp_path_factory.mktemp("collect")
    path = folder / "deep" / "hopper_random.hdf5"
    collect.main(collect.Args(out=path, quality="random", rows=500, seed=2, work=folder / "work"))
    return path


def test_a_collected_file_is_a_d4rl_file(random_file):
    with h5py.File(random_file) as f:
        raw = {k: f[k][()] for k in f}
        attributes = dict(f.attrs)
    assert set(raw) == {
        "observations", "actions", "rewards", "next_observations", "terminals", "timeouts"
    }  # fmt: skip
    assert {len(v) for v in raw.values()} == {500}
    assert raw["terminals"].dtype == raw["timeouts"].dtype == bool
    d = data.load(HOPPER, random_file)
    assert np.array_equal(d.obs, raw["observations"]) and np.array_equal(d.next_obs, raw["next_observations"])
    inside = ~d.ends[:-1]
    assert np.array_equal(d.next_obs[:-1][inside], d.obs[1:][inside])
    assert not (d.next_obs[:-1][~inside] == d.obs[1:][~inside]).all(1).any()
    assert not d.ends[-1]  # cut at exactly 500 rows, unflagged, as D4RL's files are
    assert 10 < d.ends.sum() < 40 and np.array_equal(d.ends, d.terminations > 0)
    assert np.abs(d.actions).max() <= 1 and np.abs(d.actions.mean()) < 0.05
    assert d.actions.std() == pytest.approx(3**-0.5, abs=0.03)  # uniform on [-1, 1]
    recipe, versions = json.loads(attributes["recipe"]), json.loads(attributes["versions"])
    assert recipe["rows"] == 500 and recipe["episodes"] == recipe["terminals"] == d.ends.sum()
    assert recipe["return_mean"] == pytest.approx(d.episode_returns().mean(), rel=1e-5)
    assert (recipe["env"], recipe["quality"], recipe["seed"], recipe["timeouts"]) == (
        "hopper",
        "random",
        "2",
        0,
    )
    assert attributes["env_id"] == "Hopper-v4"
    words = attributes["made_by"].split()
    assert words[:3] == ["python", "-m", "common.tools.collect"] and words[words.index("--rows") + 1] == "500"
    assert versions["mujoco"] == mujoco.__version__ and versions["torch"] == torch.__version__
    assert versions["gymnasium"] == gym.__version__ and versions["numpy"] == np.__version__
    assert [p.name for p in random_file.parent.iterdir()] == ["hopper_random.hdf5"]


def test_a_collected_episode_replays_on_the_stock_environment(random_file):
    """Same reset, the file's actions: Gymnasium's Hopper-v4 pays the file's rewards and passes its states."""
    d = data.load(HOPPER, random_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make("Hopper-v4")
    obs, _ = env.reset(seed=envs.episode_seed(2, "random", 0))
    for i in range(np.flatnonzero(d.ends)[0] + 1):
        assert np.array_equal(obs.astype(np.float32), d.obs[i])
        obs, reward, terminated, *_ = env.step(d.actions[i])
        assert np.float32(reward) == d.rewards[i] and terminated == d.terminations[i]
    assert np.array_equal(obs.astype(np.float32), d.next_obs[i])


def test_the_same_recipe_makes_the_same_rows(random_file, tmp_path):
    collect.main(collect.Args(out=tmp_path / "b.hdf5", quality="random", rows=200, seed=2))
    collect.main(collect.Args(out=tmp_path / "c.hdf5", quality="random", rows=200, seed=3))
    a, b, c = (data.load(HOPPER, p) for p in (random_file, tmp_path / "b.hdf5", tmp_path / "c.hdf5"))
    assert all(np.array_equal(x[:200], y) for x, y in zip(a[:6], b[:6], strict=True))
    assert not np.array_equal(b.obs, c.obs)


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "mine.hdf5").write_text("precious")
    with pytest.raises(UsageError, match=r"mine\.hdf5"):
        collect.main(collect.Args(out=tmp_path / "mine.hdf5", quality="random", rows=100))
    assert (tmp_path / "mine.hdf5").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": -1}, {"epoch": -1}, {"seed": -1}])
def test_wrong_numbers_are_refused_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(UsageError):
        collect.main(collect.Args(out=tmp_path / "x" / "x.hdf5", quality="random", **wrong))
    assert list(tmp_path.iterdir()) == []


def test_medium_expert_takes_no_epoch(tmp_path):
    with pytest.raises(UsageError):
        collect.main(collect.Args(out=tmp_path / "x.hdf5", quality="medium-expert", epoch=3))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_no_crash(tmp_path):
    """UsageError, or the OSError that `run.main` turns into one line and exit 2."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises((UsageError, NotADirectoryError)):
        collect.main(collect.Args(out=tmp_path / "file" / "x.hdf5", quality="random", rows=50))


def test_whole_episodes_are_whole(tmp_path):
    collect.main(collect.Args(out=tmp_path / "x.hdf5", quality="random", rows=300, whole_episodes=True))
    d = data.load(HOPPER, tmp_path / "x.hdf5")
    assert 200 < len(d.obs) <= 300 and d.ends[-1]


def test_no_room_for_a_whole_episode_is_refused(tmp_path):
    """HalfCheetah's episodes have 1,000 steps: 500 rows of whole episodes are none, and no loader takes them."""
    args = collect.Args(
        out=tmp_path / "x.hdf5", env="halfcheetah", quality="random", rows=500, whole_episodes=True
    )
    with pytest.raises(UsageError):
        collect.main(args)
    assert list(tmp_path.iterdir()) == []


def random_tensors(n: int = 64) -> tuple[torch.Tensor, ...]:
    """Observations, actions, rewards, successors, terminals for SAC on Hopper's dimensions."""
    g = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, n, 11, generator=g)
    actions = torch.rand(n, 3, generator=g) * 2 - 1
    return obs, actions, torch.randn(n, generator=g), next_obs, (torch.arange(n) % 4 == 0).float()


def test_the_policy_s_log_prob_is_the_density_of_its_action():
    """Change of variables through PyTorch's TanhTransform, in float64."""
    torch.manual_seed(0)
    policy = collect.Policy(11, 3).double()
    obs = torch.randn(200, 11, dtype=torch.float64)
    action, log_prob = policy(obs)
    mean, log_std = policy.net(obs).chunk(2, -1)
    density = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform()
    )
    assert action.shape == (200, 3) and log_prob.shape == (200,)
    assert action.abs().max() < 1
    assert torch.allclose(log_prob, density.log_prob(action).sum(-1), atol=1e-9)


def test_the_policy_s_log_prob_is_finite_where_tanh_saturates():
    policy = collect.Policy(11, 3)
    with torch.no_grad():
        policy.net[-1].bias[:3] = 30.0
        policy.net[-1].bias[3:] = -50.0  # below the floor of the log-std
    action, log_prob = policy(torch.zeros(4, 11))
    assert torch.equal(action, torch.ones(4, 3)) and torch.isfinite(log_prob).all()


def test_one_sac_step_moves_everything_it_should():
    """Targets by 5e-3 of the way to the new critics; the temperature by Adam's first step, -3e-4: too much entropy.

    (A fresh policy is nearly uniform, log-density about -3 log 2 = -2.1; the entropy target is -3.)
    """
    torch.manual_seed(0)
    sac = collect.SAC(11, 3)
    before = {k: v.clone() for k, v in sac.nets.state_dict().items()}
    old = {k: v.clone() for k, v in sac.targets.state_dict().items()}
    assert all(torch.equal(old[k], before[k]) for k in old) and {k[:2] for k in old} == {"q1", "q2"}
    assert not torch.equal(before["q1.0.weight"], before["q2.0.weight"])
    sac.update(*random_tensors())
    after, new = sac.nets.state_dict(), sac.targets.state_dict()
    assert all(not torch.equal(after[k], before[k]) for k in before)
    for k in old:
        assert torch.allclose(new[k], old[k] + 0.005 * (after[k] - old[k]), rtol=0, atol=1e-8)
        assert not torch.equal(new[k], old[k])
    assert sac.log_alpha.item() == pytest.approx(-3e-4, rel=1e-3)


def test_sac_critics_learn_the_reward_where_everything_ends():
    """All rows terminal: the TD target is the reward itself, here obs[0], whatever the targets say."""
    torch.manual_seed(0)
    sac, (obs, actions, _, next_obs, _) = collect.SAC(11, 3), random_tensors(128)
    with torch.no_grad():
        for net in sac.targets.values():
            net[-1].bias.fill_(1e3)  # would show if the mask were missing
    for _ in range(150):
        sac.update(obs, actions, obs[:, 0], next_obs, torch.ones(128))
    for k in ("q1", "q2"):
        error = sac.nets[k](torch.cat([obs, actions], -1)).squeeze(-1) - obs[:, 0]
        assert error.square().mean().item() < 0.05  # the reward's own variance is 1


def test_a_restored_sac_goes_on_alike_and_its_temperature_still_trains():
    torch.manual_seed(0)
    a, b = collect.SAC(11, 3), collect.SAC(11, 3)
    a.update(*random_tensors())
    b.load_state_dict(copy.deepcopy(a.state_dict()))  # as from a file: Adam would share its moments
    for sac in (a, b):
        torch.manual_seed(1)
        sac.update(*random_tensors())
    for x, y in ((a.nets, b.nets), (a.targets, b.targets)):
        assert all(torch.equal(v, y.state_dict()[k]) for k, v in x.state_dict().items())
    assert a.log_alpha.item() == b.log_alpha.item() == pytest.approx(-6e-4, rel=1e-2)


class Killed(Exception):
    """Stands for kill -9."""


def test_sac_training_is_resumed_where_it_was_killed(tmp_path, monkeypatch):
    """Epochs 0 and 1, killed in the middle of 1 and taken up again, give the same replay and policy.

    The gradient step is a cheap one that depends on the batch, so that the order of random numbers matters.
    """
    calls, deadly = [0], [0]

    def cheap_update(self, _obs, _actions, rewards, *_) -> None:
        calls[0] += 1
        if calls[0] == deadly[0]:
            raise Killed
        with torch.no_grad():
            self.policy.net[-1].bias[:3].add_(1e-3 * rewards.mean())

    monkeypatch.setattr(collect.SAC, "update", cheap_update)
    env = envs.locomotion("Hopper-v4")

    def train(work: str, epoch: int = 1, die_at: int = 0):
        calls[0], deadly[0] = 0, die_at
        args = collect.Args(out=tmp_path / "unused.hdf5", work=tmp_path / work)
        return collect.train_sac(args, env, epoch)

    policy, replay = train("straight")
    assert calls[0] == 2_000
    assert {len(v) for v in replay.values()} == {3_000}  # 1,000 first, then 1,000 per epoch
    ends = replay["terminals"] | replay["timeouts"]
    assert ends[[999, 1_999, 2_999]].all()  # a path that is running at the end of an epoch is cut
    assert set(np.flatnonzero(replay["timeouts"])) <= {999, 1_999, 2_999}
    assert len(np.unique(replay["observations"][[0, 1_000, 2_000]], axis=0)) == 3  # no reset is played twice
    inside = ~ends[:-1]
    assert np.array_equal(replay["next_observations"][:-1][inside], replay["observations"][1:][inside])

    with pytest.raises(Killed):
        train("killed", die_at=1_300)
    resumed_policy, resumed = train("killed")
    assert calls[0] == 1_000  # epoch 0 was not repeated
    assert all(np.array_equal(replay[k], resumed[k]) for k in collect.FIELDS)
    for k, v in policy.state_dict().items():
        assert torch.equal(v, resumed_policy.state_dict()[k])

    again_policy, again = train("killed")  # all done: from the snapshot
    assert calls[0] == 0 and all(np.array_equal(replay[k], again[k]) for k in collect.FIELDS)
    assert torch.equal(again_policy.net[-1].bias, policy.net[-1].bias)
