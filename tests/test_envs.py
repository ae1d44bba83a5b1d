"""Environments are D4RL's: locomotion of version 4 with clipped actions; Adroit's reward by hand and beside the
packaged one, end of pen, limits, reference returns.

Frozen-Lake is Gymnasium's with the slip of one's choice, and its exact evaluation is the mean of many episodes.
"""

import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

from common import data, envs
from common.buffer import ReplayBuffer

HANDS = ("door", "hammer", "relocate", "pen")


# ---- locomotion ----


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


# ---- Adroit ----


def random_episode(env, seed: int, act_dim: int, size: float = 1.0) -> tuple[list[float], bool]:
    """Rewards of one episode of uniform actions in [-size, size] and whether it ended before its limit."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    rewards = []
    while True:
        _, reward, terminated, truncated, _ = env.step(rng.uniform(-size, size, act_dim).astype(np.float32))
        rewards.append(reward)
        if terminated or truncated:
            return rewards, terminated


@pytest.mark.parametrize(("hand", "expected", "tolerance"), [("door", -56.5, 1), ("hammer", -274.9, 10),
                                                             ("relocate", -6.4, 4)])  # fmt: skip
def test_a_random_policy_gets_d4rls_reference_return(hand, expected, tolerance):
    task = data.get_task(f"{hand}-human-v1")
    assert task.ref_min == pytest.approx(expected, abs=0.05)
    env = data.make_env(task)
    episodes = [random_episode(env, seed, task.act_dim) for seed in range(5)]
    assert all(len(rewards) == 200 and not ended for rewards, ended in episodes)
    assert np.mean([sum(rewards) for rewards, _ in episodes]) == pytest.approx(expected, abs=tolerance)


def test_pen_ends_on_the_step_it_is_dropped_and_at_100():
    task = data.get_task("pen-cloned-v1")
    env = data.make_env(task)
    episodes = [random_episode(env, seed, task.act_dim) for seed in range(8)]
    episodes += [random_episode(env, seed, task.act_dim, size=0.0) for seed in range(3)]
    dropped = [rewards for rewards, ended in episodes if ended]
    assert dropped and all(len(rewards) <= 100 for rewards, _ in episodes)
    assert all(rewards[-1] < -4 and min(rewards[:-1]) > -4 for rewards in dropped)  # -5 once, then over
    held = [rewards for rewards, ended in episodes if not ended]
    assert held and all(len(rewards) == 100 for rewards in held)


@pytest.mark.parametrize("hand", HANDS)
def test_reward_is_the_packaged_one_with_the_first_sign_put_right(hand, monkeypatch):
    """Version 1 adds 0.1 |palm - object| where D4RL (and version 2) subtract it; pen has no such term."""
    env, rng, packaged = envs.adroit(hand, 200), np.random.default_rng(1), []
    body, step = env.unwrapped, env.unwrapped.step

    def recorded(action):
        result = step(action)
        packaged.append(result[1])
        return result

    monkeypatch.setattr(body, "step", recorded)
    env.reset(seed=3)
    for _ in range(40):
        _, reward, *_ = env.step(rng.uniform(-1, 1, body.action_space.shape).astype(np.float32))
        palm = body.data.site("S_grasp").xpos
        if hand == "door":
            thing = body.data.site("S_handle").xpos
        else:
            thing = palm if hand == "pen" else body.data.body("Object").xpos
        wrong = 0.2 * np.linalg.norm(palm - thing) if body.spec.id.endswith("v1") else 0.0
        assert reward == pytest.approx(packaged[-1] - wrong, abs=1e-9)


def placed(hand: str, joints: dict[str, float]) -> envs.Adroit:
    """The hand's environment after a reset, with some joints (radians, metres) moved and everything at rest."""
    env = envs.adroit(hand, 200)
    env.reset(seed=0)
    body = env.unwrapped
    for name, value in joints.items():
        body.data.joint(name).qpos[0] = value
    body.data.qvel[:] = 0
    mujoco.mj_forward(body.model, body.data)
    return env.env


@pytest.mark.parametrize(("angle", "bonus"), [(0.1, 0), (0.3, 2), (1.1, 10), (1.4, 20)])
def test_door_pays_by_hinge_angle(angle, bonus):
    env = placed("door", {"door_hinge": angle})
    palm, handle = (env.unwrapped.data.site(x).xpos for x in ("S_grasp", "S_handle"))
    by_hand = -0.1 * np.sqrt(((palm - handle) ** 2).sum()) - 0.1 * (angle - 1.57) ** 2 + bonus
    assert env.reward() == (pytest.approx(by_hand, abs=1e-12), False)


@pytest.mark.parametrize(("left", "bonus"), [(0.2, 0), (0.07, 10), (0.03, 30)])
def test_relocate_pays_by_distance_and_for_lifting(left, bonus):
    """The ball `left` metres beside its target, 0.15 m or more above the table."""
    env = placed("relocate", {})
    body = env.unwrapped
    target, palm = body.data.site("target").xpos.copy(), body.data.site("S_grasp").xpos.copy()
    body.data.body("Object").xpos[:] = ball = target + np.array([left, 0, 0])
    by_hand = -0.1 * np.sqrt(((palm - ball) ** 2).sum()) + 1 - 0.5 * np.sqrt(((palm - target) ** 2).sum())
    assert env.reward() == (pytest.approx(by_hand - 0.5 * left + bonus, abs=1e-9), False)
    body.data.body("Object").xpos[2] = 0.03  # on the table: the first term alone, and nothing is near
    ball = body.data.body("Object").xpos
    assert env.reward()[0] == pytest.approx(-0.1 * np.sqrt(((palm - ball) ** 2).sum()), abs=1e-9)


@pytest.mark.parametrize(("left", "bonus"), [(0.03, 0), (0.015, 25), (0.005, 100)])
@pytest.mark.parametrize("lifted", [False, True])
def test_hammer_pays_by_depth_and_for_lifting(left, bonus, lifted):
    env = placed("hammer", {})
    state = env.unwrapped.data
    nail, palm = state.site("S_target").xpos, state.site("S_grasp").xpos
    state.site("nail_goal").xpos[:] = nail + np.array([0, left, 0])
    state.site("tool").xpos[2] = state.body("Object").xpos[2] = 0.2 if lifted else 0.03
    hammer, head = state.body("Object").xpos, state.site("tool").xpos
    by_hand = -0.1 * np.linalg.norm(palm - hammer) - np.linalg.norm(head - nail) - 10 * left
    assert env.reward() == (pytest.approx(by_hand + bonus + 2 * lifted, abs=1e-9), False)


def test_pen_pays_for_place_and_direction():
    """At the wanted place: 1 + 60 when parallel, cos + 10 at 23 degrees, 0 at a right angle; far away no bonus."""
    env = placed("pen", {})
    body = env.unwrapped
    state = body.data
    body.pen_length = body.tar_length = 1.0
    for name in ("object_bottom", "target_bottom"):
        state.site(name).xpos[:] = 0
    state.site("target_top").xpos[:] = [1, 0, 0]
    state.body("Object").xpos[:] = state.site("eps_ball").xpos[:] = [0, 0, 0.2]
    for degrees, bonus in ((0, 60), (23, 10), (90, 0)):
        angle = np.deg2rad(degrees)
        state.site("object_top").xpos[:] = [np.cos(angle), np.sin(angle), 0]
        assert env.reward() == (pytest.approx(np.cos(angle) + bonus, abs=1e-9), False)
    state.site("object_top").xpos[:] = [1, 0, 0]
    state.body("Object").xpos[0] = 0.1
    assert env.reward() == (pytest.approx(1 - 0.1, abs=1e-9), False)
    state.body("Object").xpos[2] = 0.05
    reward, dropped = env.reward()
    assert dropped and reward == pytest.approx(1 - np.hypot(0.1, 0.15) - 5, abs=1e-9)


def test_limits_shapes_and_names_of_the_twelve_files():
    limits = {"pen": 100, "door": 200, "hammer": 200, "relocate": 200}
    names = [f"{hand}-{quality}-v1" for hand in HANDS for quality in ("human", "cloned", "expert")]
    for name in names:
        task = data.get_task(name)
        assert task.limit == limits[name.split("-")[0]] and task.file == f"hand_dapg_v1/{name}.hdf5"
        assert (task.sha256 is None) == (task.size is None) == name.startswith("relocate")
    env = data.make_env(data.get_task("relocate-expert-v1"))
    assert env.unwrapped.model.nu == 30 and env.spec.max_episode_steps == 200


def test_the_builder_is_quiet(capfd):
    envs.adroit("door", 200)
    assert capfd.readouterr() == ("", "")


# ---- Frozen-Lake ----


def best_moves(env: envs.FrozenLake, gamma: float = 0.99) -> np.ndarray:
    """The moves (S, 4) that are optimal for `gamma` without a time limit, by value iteration."""
    states, values = len(env.states), np.zeros(len(env.states))
    rewards, going_on = np.zeros((states, 4)), np.zeros((states, 4, states))
    for s, moves in env.env.unwrapped.P.items():
        for a, outcomes in moves.items():
            for p, n, r, over in outcomes:
                rewards[s, a] += p * r
                going_on[s, a, n] += p * (not over)
    for _ in range(2_000):
        q = rewards + gamma * going_on @ values
        values = q.max(1)
    return env.moves[q.argmax(1)]


@pytest.mark.parametrize(("size", "limit", "before", "after", "best"),
                         [("4x4", 100, 0.89, 0.22, 0.77), ("8x8", 200, 0.90, 0.38, 0.93)])  # fmt: skip
def test_exact_success_of_optimal_policies_is_the_published_one(size, limit, before, after, best):
    """Policies optimal for slip 0.1 and 0.5; figures of dual.md 5.1."""
    calm, slippery = (envs.FrozenLake(size, limit, slip) for slip in (0.1, 0.5))
    assert calm.exact(best_moves(calm))[0] == pytest.approx(before, abs=0.005)
    assert slippery.exact(best_moves(calm))[0] == pytest.approx(after, abs=0.005)
    assert slippery.exact(best_moves(slippery))[0] == pytest.approx(best, abs=0.005)


def test_exact_success_and_length_are_the_means_of_episodes():
    env = envs.FrozenLake("4x4", 20, 0.3)  # a limit that bites
    actions = best_moves(env)
    returns, lengths = [], []
    for seed in range(3_000):
        obs, _ = env.reset(seed=seed)
        total = length = 0
        while True:
            obs, reward, terminated, truncated, _ = env.step(actions[obs.argmax()])
            total, length = total + reward, length + 1
            if terminated or truncated:
                break
        returns.append(total)
        lengths.append(length)
    success, mean = env.exact(actions)
    assert success == pytest.approx(np.mean(returns), abs=4 * np.std(returns) / 3_000**0.5)
    assert mean == pytest.approx(np.mean(lengths), abs=4 * np.std(lengths) / 3_000**0.5)


def test_exact_success_of_a_policy_that_draws_right_or_down():
    """1/8, by hand from the goal back: 1 in the last row, 1/2, 3/4, 3/8 in the third, 1/4, 3/16, then 1/16, 1/8.

    One draw per state, repeated at every visit, would walk into the border for good, or never.
    """
    env = envs.FrozenLake("4x4", 1_000, 0.0)
    right, down = (np.tile(np.eye(4)[move], (16, 1)) for move in (2, 1))
    assert env.exact(np.stack([right, down]))[0] == pytest.approx(1 / 8)
    evaluate, seen = data.Evaluator(data.get_task("frozenlake-4x4-slip-0.1"), 1, 0), []

    def act(obs: torch.Tensor) -> torch.Tensor:
        seen.append(torch.eye(4)[torch.where(torch.rand(len(obs)) < 0.5, 1, 2)])
        return seen[-1]

    score = evaluate(act, torch.device("cpu"))["eval/score"]
    exact = evaluate.envs[0].get_wrapper_attr("exact")  # with the task's slip
    assert len(seen) == evaluate.DRAWS and score == pytest.approx(100 * exact(torch.stack(seen).numpy())[0])
    evaluate(lambda obs: torch.eye(4)[torch.ones(len(obs), dtype=torch.long)], torch.device("cpu"))
    assert evaluate(act, torch.device("cpu"))["eval/score"] == score  # from the evaluation's own seed


def test_slip_goes_to_either_side_of_the_move():
    env = envs.FrozenLake("4x4", 100, 0.5)
    table = env.env.unwrapped.P
    down = table[6][1]  # from row 1, column 2: all four neighbours differ
    assert sorted((p, n) for p, n, *_ in down) == [(0.25, 5), (0.25, 7), (0.5, 10)]  # left, right, down
    assert {n: over for _, n, _, over in down} == {5: True, 7: True, 10: False}  # holes end it
    for outcomes in (x for moves in table.values() for x in moves.values()):
        assert sum(p for p, *_ in outcomes) == pytest.approx(1)


def test_the_move_that_was_executed_is_stored_and_replayed():
    """Stored actions are one-hot, whatever was asked for; a resumed episode goes through the same states."""
    task = data.get_task("frozenlake-8x8")
    asked = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)

    def play(interaction, first, last):
        for i in range(first, last):
            interaction.step(lambda _, i=i: torch.from_numpy(asked[i][None]))

    straight = ReplayBuffer(12, 64, 4, torch.device("cpu"))
    play(data.Interaction(data.make_env(task), straight, 3), 0, 12)
    actions = straight.take(torch.arange(12)).actions.numpy()
    assert set(np.unique(actions)) == {-1.0, 1.0} and (actions.argmax(1) == asked.argmax(1)).all()
    first, second = (ReplayBuffer(12, 64, 4, torch.device("cpu")) for _ in range(2))
    stopped = data.Interaction(data.make_env(task), first, 3)
    play(stopped, 0, 7)
    second.load_state_dict(first.state_dict())
    resumed = data.Interaction(data.make_env(task), second, 3)
    resumed.load_state_dict(stopped.state_dict())
    play(resumed, 7, 12)
    assert torch.equal(second.table, straight.table)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_evaluator_takes_the_exact_score_of_a_policy(normalized):
    """The policy sees all states as the agent does, normalised or not; the score is percent of success."""
    task = data.get_task("frozenlake-4x4-slip-0.1")
    mean, std = np.linspace(-1, 1, 16, dtype=np.float32), np.linspace(0.5, 2, 16, dtype=np.float32)
    moves = torch.from_numpy(best_moves(task.make()))

    def policy(obs: torch.Tensor) -> torch.Tensor:
        states = obs * torch.from_numpy(std) + torch.from_numpy(mean) if normalized else obs
        assert torch.allclose(states, 2 * torch.eye(16) - 1, atol=1e-5)
        return moves[states.argmax(1)]

    evaluate = data.Evaluator(task, 10, 0, data.Units(moments=(mean, std) if normalized else None))
    result = evaluate(policy, torch.device("cpu"))
    assert result["eval/score"] == pytest.approx(88.9, abs=0.05)
    assert result["eval/return"] == pytest.approx(0.889, abs=5e-4) and len(evaluate.envs) == 1
