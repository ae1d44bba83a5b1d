"""Environments that are D4RL's today: builders and wrappers, nothing else.

D4RL's locomotion tasks are gym's Hopper/HalfCheetah/Walker2d-v2 inside a wrapper that clips actions to the box. Their
equal today is Gymnasium's -v4 (same models, reward, termination, reset noise) with `ClipAction`: MuJoCo clamps the
control by itself, but the control cost is charged on what the agent sent. Never -v5: Walker2d's right foot and
Hopper's terminal reward changed there.

Adroit comes from gymnasium-robotics, which has the models, with D4RL's reward, end and time limit put back.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Callable

import gymnasium as gym
import mujoco
import numpy as np


def locomotion(env_id: str) -> gym.Env:
    """`env_id` (a Gymnasium -v4 id) with actions clipped to the box; silent about being an old version."""
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda _: None)  # or HalfCheetah writes MUJOCO_LOG.TXT where the user stands
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gym.wrappers.ClipAction(gym.make(env_id))
    finally:
        mujoco.set_mju_user_warning(previous)


class Adroit(gym.Wrapper):
    """D4RL's Adroit: the dense reward from the simulator's state after the step; pen ends when it is dropped.

    gymnasium-robotics 1.2.1 to 1.4.2 pay for staying away from the object (the sign of the first term is wrong), and
    none of its versions ends pen. `info["success"]` stays: D4RL's goal_achieved.
    """

    def __init__(self, env: gym.Env, task: str):
        super().__init__(env)
        self.reward = getattr(self, task)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, _, _, truncated, info = self.env.step(action)
        reward, terminated = self.reward()
        return obs, float(reward), bool(terminated), truncated, info

    def site(self, name: str) -> np.ndarray:
        """Position of a site, (3,) in metres."""
        return self.env.unwrapped.data.site(name).xpos

    @property
    def object(self) -> np.ndarray:
        """Position of the body to be moved, (3,) in metres."""
        return self.env.unwrapped.data.body("Object").xpos

    def door(self) -> tuple[float, bool]:
        state = self.env.unwrapped.data
        angle = state.joint("door_hinge").qpos[0]
        reward = -0.1 * math.dist(self.site("S_grasp"), self.site("S_handle")) - 0.1 * (angle - 1.57) ** 2
        reward -= 1e-5 * np.square(state.qvel).sum()
        return reward + 2 * (angle > 0.2) + 8 * (angle > 1.0) + 10 * (angle > 1.35), False

    def hammer(self) -> tuple[float, bool]:
        head, nail = self.site("tool"), self.site("S_target")
        left = math.dist(nail, self.site("nail_goal"))
        reward = -0.1 * math.dist(self.site("S_grasp"), self.object) - math.dist(head, nail) - 10 * left
        reward -= 0.01 * np.linalg.norm(self.env.unwrapped.data.qvel)
        lifted = self.object[2] > 0.04 and head[2] > 0.04
        return reward + 2 * lifted + 25 * (left < 0.02) + 75 * (left < 0.01), False

    def relocate(self) -> tuple[float, bool]:
        palm, target = self.site("S_grasp"), self.site("target")
        left = math.dist(self.object, target)
        reward = -0.1 * math.dist(palm, self.object)
        if self.object[2] > 0.04:
            reward += 1 - 0.5 * math.dist(palm, target) - 0.5 * left
        return reward + 10 * (left < 0.1) + 20 * (left < 0.05), False

    def pen(self) -> tuple[float, bool]:
        body = self.env.unwrapped
        left = math.dist(self.object, self.site("eps_ball"))
        axis = (self.site("object_top") - self.site("object_bottom")) / body.pen_length
        wanted = (self.site("target_top") - self.site("target_bottom")) / body.tar_length
        alike = axis @ wanted  # 1: parallel
        reward = -left + alike + 10 * (left < 0.075 and alike > 0.9) + 50 * (left < 0.075 and alike > 0.95)
        dropped = self.object[2] < 0.075
        return reward - 5 * dropped, dropped


def adroit(task: str, limit: int) -> gym.Env:
    """ "door", "hammer", "relocate" or "pen" with D4RL's time limit in steps."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():  # a notice at import
        warnings.simplefilter("ignore")
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        ids = [f"AdroitHand{task.capitalize()}-{version}" for version in ("v2", "v1")]
        env = gym.make(next(x for x in ids if x in gym.registry), disable_env_checker=True).unwrapped
    return gym.wrappers.TimeLimit(Adroit(env, task), limit)


class FrozenLake(gym.Wrapper):
    """Gymnasium's FrozenLake-v1 as a task with vectors: position and move are one-hot in {-1, 1}.

    obs (S,), actions (4,) of which the largest is the move; `info["executed"]` is that move's own vector, the action to
    store. `slip` is the probability of going perpendicular to the move, half of it to each side; 1 for reaching
    the goal, 0 otherwise.
    """

    def __init__(self, size: str, limit: int, slip: float):
        super().__init__(gym.make("FrozenLake-v1", map_name=size, is_slippery=False, max_episode_steps=limit))
        body, self.limit = self.env.unwrapped, limit
        self.states = 2 * np.eye(body.observation_space.n, dtype=np.float32) - 1  # (S, S)
        self.moves = 2 * np.eye(4, dtype=np.float32) - 1
        self.observation_space = gym.spaces.Box(-1, 1, (len(self.states),), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
        sure = {s: {a: body.P[s][a][0] for a in range(4)} for s in body.P}  # (1.0, next, reward, over)
        for s, moves in sure.items():  # `success_rate` exists in newer versions only
            for a in moves:
                likely = ((a, 1 - slip), ((a - 1) % 4, slip / 2), ((a + 1) % 4, slip / 2))
                body.P[s][a] = [(p, *moves[b][1:]) for b, p in likely]

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        state, info = self.env.reset(**kwargs)
        return self.states[state], info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        move = int(np.argmax(action))
        state, reward, terminated, truncated, info = self.env.step(move)
        return self.states[state], float(reward), terminated, truncated, info | {"executed": self.moves[move]}

    def exact(self, actions: np.ndarray) -> tuple[float, float]:
        """Success probability and mean episode length of the policy `actions` (S, 4), by dynamic programming."""
        table, moves = self.env.unwrapped.P, actions.argmax(1)
        n = len(self.states)
        step, reach = np.zeros((n, n)), np.zeros(n)  # to states that go on; reward of one step
        for s, move in enumerate(moves):
            for p, following, reward, over in table[s][move]:
                reach[s] += p * reward
                step[s, following] += p * (not over)
        here, success, length = np.zeros(n), 0.0, 0.0
        here[0] = 1.0  # both maps start in the corner
        for _ in range(self.limit):
            success, length = success + here @ reach, length + here.sum()
            here = here @ step
        return float(success), float(length)


class Flat(gym.Wrapper):
    """Any environment of boxes (or dicts of them) as the agents know it: obs (O,), actions (A,) in [-1, 1]."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.flatten_space(env.observation_space)
        box = env.action_space
        if not all(isinstance(x, gym.spaces.Box) for x in (box, self.observation_space)):
            raise TypeError(f"observations and actions must be boxes, got {env.observation_space}, {box}")
        if box.shape != box.low.ravel().shape or not box.is_bounded():
            raise TypeError(f"actions must be one bounded vector, got {box}")
        self.center, self.half = (box.high + box.low) / 2, (box.high - box.low) / 2
        self.action_space = gym.spaces.Box(-1, 1, box.shape, np.float32)

    def flatten(self, obs: np.ndarray | dict, space: gym.Space | None = None) -> np.ndarray:
        """Observations with any leading dimensions, (..., O); dicts in the order of their space."""
        space = space or self.env.observation_space
        if isinstance(space, gym.spaces.Dict):
            return np.concatenate([self.flatten(obs[k], space[k]) for k in space.spaces], axis=-1)
        return np.reshape(obs, (*np.shape(obs)[: np.ndim(obs) - len(space.shape)], -1))

    def inverse(self, actions: np.ndarray) -> np.ndarray:
        """The environment's actions (..., A) in the agents' units."""
        return (actions - self.center) / self.half

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        return self.flatten(obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        sent = self.center + self.half * np.clip(action, -1, 1)
        obs, reward, terminated, truncated, info = self.env.step(sent.astype(self.env.action_space.dtype))
        return self.flatten(obs), float(reward), terminated, truncated, info


def flat(make: Callable[..., gym.Env], **kwargs) -> gym.Env:
    """`make(**kwargs)` as vectors; silent about versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Flat(make(**kwargs))


def episode_seed(seed: int, purpose: str, episode: int) -> int:
    """Reset seed of one episode; `purpose` ("online", "eval", ...) keeps the streams apart.

    A function of its arguments alone, so that a resumed run and an uninterrupted one see the same episodes.
    """
    return int(np.random.SeedSequence([seed, *purpose.encode(), episode]).generate_state(1)[0])


def simulate(env: gym.Env, obs: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """What a locomotion simulator says of raw obs (N, O), actions (N, A): next obs (N, O), rewards (N,).

    The observation is qpos without x, then qvel (clipped to ±10 in Hopper and Walker2d); dynamics do not depend on x.
    None for other environments, whose observations do not hold the state.
    """
    body = env.unwrapped
    env.reset(seed=0)
    joints = body.model.nq - 1
    if joints + body.model.nv != obs.shape[1]:
        return None
    next_obs, rewards = np.empty_like(obs), np.empty(len(obs), dtype=np.float32)
    for i, (o, a) in enumerate(zip(obs.astype(np.float64), actions, strict=True)):
        body.set_state(np.concatenate([[0.0], o[:joints]]), o[joints:])
        next_obs[i], rewards[i], *_ = body.step(np.clip(a, -1, 1))
    return next_obs, rewards
