"""Adroit is D4RL's: reward by hand and beside the packaged one, end of pen, limits, reference returns."""

import mujoco
import numpy as np
import pytest

from common import data, envs

HANDS = ("door", "hammer", "relocate", "pen")


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
