"""The environment loop: what is stored of an episode, episodes that are interrupted, D4RL-normalised evaluation."""

import random
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CPU, HOPPER

from common import data, envs
from common.buffer import Batch, ReplayBuffer


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


# ---- online steps ----


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
    assert torch.equal(batch.obs[1:5], batch.next_obs[:4])
    assert not torch.equal(batch.obs[5], batch.next_obs[4])


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


# ---- evaluation ----


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
    """A policy that shakes the robot for 100 steps: the same returns and lengths from one thread and from three."""
    task, results = data.TASKS[name], []
    task = replace(task, make=lambda make=task.make: gym.wrappers.TimeLimit(make(), 100))

    def policy(obs: torch.Tensor) -> torch.Tensor:
        return torch.sin(40 * obs.sum(1, keepdim=True) + torch.arange(task.act_dim))

    for threads in (1, 3):
        evaluator = data.Evaluator(task, 5, 0)
        assert 1 <= evaluator.threads <= 5 and data.Evaluator(data.TASKS[HOPPER], 5, 0).threads == 1
        evaluator.threads = threads
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
