"""Tasks and what is in their files: the table, D4RL's layout read row by row, training units, files that are refused.

Files are made by hand in tmp_path; nothing here needs a network or a real dataset. Downloads: test_files.py.
"""

import hashlib
import random
import warnings
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import HOPPER, good, write

from common import data
from common.run import UsageError

TINY = replace(data.TASKS[HOPPER], obs_dim=1, act_dim=1)  # for files whose numbers can be read at a glance


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


# ---- the table ----


def test_the_table_is_d4rl_s_tasks_dual_s_and_the_embedded_one():
    robots, levels = "hopper halfcheetah walker2d", "random medium medium-replay medium-expert expert"
    names = {f"{x}-{y}-v2" for x in robots.split() for y in levels.split()}
    robots, levels = "pen door hammer relocate", "human cloned expert"
    hands = {f"{x}-{y}-v1" for x in robots.split() for y in levels.split()}
    slips = ("", "-slip-0.1", "-slip-0.2", "-slip-0.3", "-slip-0.4")
    lakes = {f"frozenlake-{x}{y}" for x in ("4x4", "8x8") for y in slips}
    ants = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse"
    mazes = {f"maze2d-{x}-v1" for x in ("umaze", "medium", "large")}
    mazes |= {f"antmaze-{x}-v2" for x in ants.split()}
    shifts = {"halfcheetah-friction-2.0", "halfcheetah-medium-replay-gravity-2.0", "hopper-friction-2.0"}
    shifts |= {"hopper-kinematic-2.0", "walker2d-morphology-2.0"}
    assert set(data.TASKS) == names | hands | lakes | mazes | shifts | {"hopper-mini-v0", "reacher-mini-v0"}
    assert len(data.TASKS) == 15 + 12 + 10 + 9 + 5 + 2
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
    assert len(set(hashes)) == len(hashes) == 15 + 9 + 5 + 2 and all(len(h) == 64 for h in hashes)


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


# ---- the loader ----


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
    known = read_tiny(tmp_path, 8, [2, 7], [5], False).known
    assert known.tolist() == [True, True, False, True, True, True, False]


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


# ---- refusals ----


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


@pytest.mark.parametrize("key", ["terminals", "timeouts"])
@pytest.mark.parametrize("value, kind", [(7, "i4"), (-1, "i1"), (255, "u1"), (0.5, "f4"), (0.99, "f2")])
def test_flags_other_than_0_and_1_are_refused_with_value_count_and_place(key, value, kind, tmp_path):
    """They would be read as a truth value: 7 as an end, -1 as none."""
    arrays = good(8)
    arrays[key] = arrays[key].astype(kind)
    arrays[key][[3, 5]] = value
    told = f"2 rows of '{key}' are neither 0 nor 1, first 3: {arrays[key][3]:g}; allowed: 0 or 1, or booleans"
    assert told in refusal(write(tmp_path / "x.hdf5", arrays))


@pytest.mark.parametrize("kind", ["?", "u1", "f4"])
def test_terminals_in_every_row_are_refused_and_timeouts_are_not(kind, tmp_path):
    """Without `next_observations` too; a timeout in every row is an episode of one step that keeps its bootstrap."""
    arrays, ones = good(8), np.ones(8, kind)
    broken = arrays | {"terminals": ones}
    told = "'terminals' is 1 in every row; allowed: 1 only where the MDP ended"
    assert told in refusal(write(tmp_path / "x.hdf5", broken))
    del broken["next_observations"]
    assert told in refusal(write(tmp_path / "y.hdf5", broken))
    d = data.read_d4rl(write(tmp_path / "z.hdf5", arrays | {"timeouts": ones}), data.TASKS[HOPPER], "")
    assert d.ends.all() and d.terminations.tolist() == [0] * 7 + [1]


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
