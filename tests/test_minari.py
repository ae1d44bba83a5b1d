"""Minari datasets as tasks of their own: rows, scores, environments, refusals; and our files written as Minari's."""

import warnings

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import log_rows, module, tiny_args
from minari.data_collector import EpisodeBuffer

from common import data, envs, files
from common.run import UsageError


@pytest.fixture(autouse=True)
def folder(minari_home):
    return minari_home


def make_dataset(name: str, env_id: str, lengths: list[int], **known) -> list[EpisodeBuffer]:
    """A dataset of random actions in `env_id` with episodes cut at `lengths`."""
    env, buffers = gym.make(env_id), []
    env.action_space.seed(0)
    for k, length in enumerate(lengths):
        obs, acts, rewards, ends = [env.reset(seed=k)[0]], [], [], []
        while len(acts) < length and not (ends and ends[-1]):
            acts.append(env.action_space.sample())
            o, r, terminated, *_ = env.step(acts[-1])
            obs.append(o)
            rewards.append(r)
            ends.append(terminated)
        cut = [False] * (len(ends) - 1) + [not ends[-1]]
        if isinstance(obs[0], dict):
            obs = {key: np.stack([o[key] for o in obs]) for key in obs[0]}
        buffers.append(EpisodeBuffer(id=k, observations=obs, actions=acts, rewards=rewards, terminations=ends,
                                     truncations=cut))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about authors and links
        minari.create_dataset_from_buffers(name, buffers, env=env, **known)
    return buffers


def test_rows_are_the_episodes_with_true_successors():
    """Two Hopper episodes, one fallen, one cut: obs[t + 1] of the same episode, never of the next."""
    known = dict(ref_min_score=-20.0, ref_max_score=180.0)
    buffers = make_dataset("mujoco/hopper/tiny-v0", "Hopper-v5", [400, 5], **known)
    task, dataset = data.get_task("mujoco/hopper/tiny-v0"), data.load("mujoco/hopper/tiny-v0")
    assert (task.obs_dim, task.act_dim, task.limit, task.rows) == (11, 3, 1_000, len(dataset.rewards))
    n = len(buffers[0].rewards)
    assert n < 400 and len(dataset.rewards) == n + 5
    assert np.flatnonzero(dataset.ends).tolist() == [n - 1, n + 4]
    assert np.flatnonzero(dataset.terminations).tolist() == [n - 1]
    for first, buffer in ((0, buffers[0]), (n, buffers[1])):
        rows = slice(first, first + len(buffer.rewards))
        assert np.array_equal(dataset.obs[rows], np.float32(buffer.observations[:-1]))
        assert np.array_equal(dataset.next_obs[rows], np.float32(buffer.observations[1:]))
        assert np.array_equal(dataset.actions[rows], np.float32(buffer.actions))
        assert np.array_equal(dataset.rewards[rows], np.float32(buffer.rewards))
    assert all(x.dtype == np.float32 for x in dataset[:5]) and dataset.ends.dtype == bool
    assert dataset.path.is_file() and dataset.sha256 == files.sha256_of(dataset.path)


def test_scores_are_minaris_where_it_has_them_and_returns_otherwise():
    make_dataset("ours/with-v0", "Hopper-v5", [3], ref_min_score=-20.0, ref_max_score=180.0)
    make_dataset("ours/without-v0", "Hopper-v5", [3])
    assert data.get_task("ours/with-v0").score(80.0) == 50.0
    assert data.get_task("ours/without-v0").score(80.0) == 80.0


def test_dict_observations_and_other_action_ranges():
    """Pusher's ±2 becomes ±1; a dict is its parts in the order of the space."""
    buffers = make_dataset("ours/pusher-v0", "Pusher-v5", [4])
    dataset = data.load("ours/pusher-v0")
    assert np.allclose(2 * dataset.actions, buffers[0].actions, atol=1e-6)
    env = data.make_env(data.get_task("ours/pusher-v0"))
    seen = []
    env.env.step = lambda a: seen.append(a) or (env.env.observation_space.sample(), 0.0, False, False, {})
    env.step(np.array([1, -1, 0.5, 0, 0, 0, 3], dtype=np.float32))
    assert np.allclose(seen[0], [2, -2, 1, 0, 0, 0, 2])

    class Parts(gym.Env):
        observation_space = gym.spaces.Dict(
            {"b": gym.spaces.Box(-1, 1, (2,)), "a": gym.spaces.Box(-1, 1, (2, 2), np.float64)}
        )
        action_space = gym.spaces.Box(-1, 1, (1,))

    flat = envs.Flat(Parts())
    parts = {"b": np.array([[1.0, 2.0], [3.0, 4.0]]), "a": np.arange(8.0).reshape(2, 2, 2)}
    rows = flat.flatten(parts)
    assert rows.shape == (2, flat.observation_space.shape[0])
    for row, i in zip(rows, range(2), strict=True):
        one = {k: v[i] for k, v in parts.items()}
        assert np.array_equal(row, gym.spaces.flatten(Parts.observation_space, one))


def test_training_on_a_minari_task_is_filed_under_its_own_name(tmp_path):
    make_dataset("mujoco/hopper/tiny-v0", "Hopper-v5", [30] * 6)
    args = tiny_args("iql", out_dir=tmp_path / "runs", online_steps=20)
    result = module("iql").train(type(args)(**{**args.__dict__, "env": "mujoco/hopper/tiny-v0"}))
    assert [x.name for x in (tmp_path / "runs" / "iql").iterdir()] == ["mujoco_hopper_tiny-v0"]
    scores = [(x["eval/score"], x["eval/return"]) for x in log_rows(tmp_path / "runs") if x["eval/score"]]
    assert scores and all(float(a) == pytest.approx(float(b)) for a, b in scores)
    assert result["final_score"] == pytest.approx(float(scores[-1][0]))


@pytest.mark.parametrize("name", ["mujoco/hopper/nothing-v0", "no such/thing", "/", "ours/b"])
def test_a_missing_dataset_is_one_line(folder, name):
    with pytest.raises(UsageError, match="--env") as e:
        data.get_task(name)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_discrete_actions_are_refused_in_one_line():
    make_dataset("ours/cart-v0", "CartPole-v1", [3])
    with pytest.raises(UsageError, match="must be boxes") as e:
        data.get_task("ours/cart-v0")
    assert "\n" not in str(e.value)


def test_a_damaged_file_is_refused_in_one_line(folder):
    make_dataset("ours/hurt-v0", "Hopper-v5", [3])
    path = folder / "ours" / "hurt-v0" / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UsageError, match="ours/hurt-v0") as e:
        data.load("ours/hurt-v0")
    assert "\n" not in str(e.value)
