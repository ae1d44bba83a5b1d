"""What is said of generated rows: divergences, distances, the simulator's verdict, flags; and that it is logged."""

import math

import numpy as np
import pytest
import torch
from conftest import CPU, log_rows, module, tiny_args

from algorithms import iql_synther
from common import data, edm, envs, judge
from common.tools import collect


def test_divergence_of_equal_and_of_separate_samples():
    torch.manual_seed(0)
    a = torch.randn(50_000, 2)
    assert judge.divergence(a, a) == 0 and judge.divergence(a, torch.randn(50_000, 2)) < 2e-3
    assert judge.divergence(a, a + 100) == pytest.approx(math.log(2), rel=1e-6)
    assert judge.divergence(a * 0, a * 0) == 0  # constant columns


def test_copies_of_any_row_learned_from_are_seen():
    """Own rows far away, dataset rows in several chunks: copies of the last of them have distance 0."""
    torch.manual_seed(0)
    own, dataset = torch.randn(50, 6) + 30, torch.randn(45_000, 6)
    moments = edm.Moments(6, 0, CPU)
    moments.fit([own, dataset])
    widths = (2, 1, 1, 2)
    logs = judge.describe(dataset[-500:], own, [own, dataset], moments, widths)
    assert logs["syn/nearest"] == 0.0
    assert judge.describe(dataset[-500:], own, [own], moments, widths)["syn/nearest"] > 5
    assert judge.nearest(torch.zeros(1, 2), [torch.ones(3, 2), torch.tensor([[3.0, 4.0], [0.0, 0.5]])]) == 0.5
    one = judge.describe(dataset[:1], own, [own, dataset], moments, widths)  # a single row has a std: 0
    assert one["syn/std_ratio"] == 0.0 and all(math.isfinite(v) for v in one.values())


# ---- simulator ----


@pytest.mark.parametrize("name", ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4"])
def test_simulator_repeats_real_transitions(name):
    """Set to each observation of a roll-out, it gives the stored successor and reward."""
    env, rng = envs.locomotion(name), np.random.default_rng(0)
    rows = collect.rollout(env, lambda _: rng.uniform(-1, 1, env.action_space.shape[0]), 0)
    few = (np.abs(rows["observations"]) < 9.99).all(1)  # Hopper and Walker2d clip velocities at 10
    assert few.sum() > 8
    next_obs, rewards = judge.simulate(envs.locomotion(name), rows["observations"][few], rows["actions"][few])
    assert np.allclose(next_obs, rows["next_observations"][few], atol=2e-3)
    assert np.allclose(rewards, rows["rewards"][few], atol=2e-3)


@pytest.mark.parametrize("name", ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4"])
def test_the_rule_of_termination_is_the_environments(name):
    """At every successor of random roll-outs: what step said."""
    env, rng = envs.locomotion(name), np.random.default_rng(0)
    for seed in range(4):
        rows = collect.rollout(env, lambda _: rng.uniform(-1, 1, env.action_space.shape[0]), seed)
        over = judge.terminal(envs.locomotion(name), rows["next_observations"])
        assert np.array_equal(over, rows["terminals"])
    assert rows["terminals"].any() == (name != "HalfCheetah-v4")


def test_the_rule_where_s_does_not_tell():
    assert judge.terminal(data.get_task("antmaze-umaze-v2").make(), np.zeros((3, 29))) is None
    assert judge.terminal(data.get_task("pen-human-v1").make(), np.zeros((3, 45))) is None
    assert not judge.terminal(data.get_task("maze2d-umaze-v1").make(), np.zeros((3, 4))).any()


def test_the_arm_s_rows_tell_its_state():
    """Every step of the dataset again, from the observation alone; an arm that never moves scores 0."""
    task, rows = data.get_task("reacher-mini-v0"), data.load("reacher-mini-v0")
    env, some = task.make(), np.arange(0, 12_000, 60)
    next_obs, rewards = judge.simulate(env, rows.obs[some], rows.actions[some])
    assert np.allclose(next_obs, rows.next_obs[some], atol=1e-4)
    assert np.allclose(rewards, rows.rewards[some], atol=1e-3)
    assert not judge.terminal(env, rows.next_obs[some]).any()
    returns = []
    for seed in range(200):
        env.reset(seed=seed)
        returns.append(sum(env.step(np.zeros(2))[1] for _ in range(50)))
    assert task.score(np.mean(returns)) == pytest.approx(0, abs=3 * 100 * np.std(returns) / 200**0.5 / 8.12)


def test_flags_by_hand():
    """Hopper ends below a height of 0.7. Fallen and flagged 2, fallen alone 1, flagged alone 1, neither 4."""
    env, widths = envs.locomotion("Hopper-v4"), (11, 3, 1, 11, 1)
    rows = torch.zeros(8, 27)
    rows[:, 15], rows[:3, 15] = 1.2, 0.5
    rows[[0, 1, 3], -1] = 1.0
    expected = {"fallen": 3 / 8, "flag_share": 1.0, "flag_precision": 2 / 3, "flag_recall": 2 / 3}
    assert judge.flags_of(rows, env, widths) == pytest.approx(expected)
    moments = np.full(11, 0.2, np.float32), np.full(11, 2.0, np.float32)
    scaled = rows.clone()
    scaled[:, 15:26] = (rows[:, 15:26] - 0.2) / 2.0
    scaled[:, :11] = (rows[:, :11] - 0.2) / 2.0
    normalized = data.Normalize(env, data.Units(moments=moments))
    assert judge.flags_of(scaled, normalized, widths) == pytest.approx(expected)
    none = judge.flags_of(rows[4:], env, widths)
    assert none == {"fallen": 0.0, "flag_share": 0.0, "flag_precision": 0.0, "flag_recall": 0.0}


# ---- in the log ----


NAMES = "clipped_actions clipped_rewards nonfinite terminal source_terminal fallen flag_share flag_precision"
NAMES += " flag_recall sim_error sim_error_shuffled reward_error mean_gap std_ratio nearest online_l2"
NAMES += " js_states js_actions js_rows"


@pytest.mark.parametrize("stem", ["synther", "iql_synther"])
def test_report_is_logged_and_kept(stem, dataset, tmp_path):
    """The docstring's columns, at the steps of the regenerations; the rows beside."""
    module(stem).train(tiny_args(stem, dataset=dataset, out_dir=tmp_path))
    rows = [r for r in log_rows(tmp_path) if r.get("syn/sim_error")]
    assert [r["step"] for r in rows] == ["11", "22"]
    assert {k for k, v in rows[0].items() if k[:4] == "syn/" and v} == {f"syn/{n}" for n in NAMES.split()}
    assert all(n in judge.__doc__ for n in NAMES.split())
    assert all(math.isfinite(float(r[f"syn/{n}"])) for r in rows for n in NAMES.split())
    for k, own in ((0, 11), (1, 22)):
        (path,) = tmp_path.glob(f"**/synthetic-{k}.npz")
        with np.load(path) as f:
            assert {n: x.shape for n, x in f.items()} == {
                "synthetic": (40, 27), "offline": (600, 27), "online": (own, 27)
            }  # fmt: skip


def test_report_of_real_rows_is_that_of_real_rows(dataset, tmp_path, monkeypatch):
    """Real rows handed out as generated ones: no simulator error beyond rounding, nearest real row at 0."""
    original = judge.generated_rows

    def report(generator, k, env, rewards, offline, online):
        generator.synthetic.clear()
        generator.synthetic.append(online.table[:11])
        return original(generator, k, env, rewards, offline, online)

    monkeypatch.setattr(judge, "generated_rows", report)
    changes = dict(normalize_obs=True, normalize_reward=True)
    iql_synther.train(tiny_args("iql_synther", dataset=dataset, out_dir=tmp_path, **changes))
    (row, *_) = [r for r in log_rows(tmp_path) if r.get("syn/sim_error")]
    assert float(row["syn/sim_error"]) < 2e-2 < 0.3 < float(row["syn/sim_error_shuffled"])
    assert float(row["syn/reward_error"]) < 1e-2 and float(row["syn/nearest"]) == 0.0
    assert float(row["syn/std_ratio"]) == pytest.approx(1.0, abs=0.1)
    assert float(row["syn/terminal"]) == float(row["syn/source_terminal"])  # not of rows that are gone
