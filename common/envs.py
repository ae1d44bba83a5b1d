"""Environments that are D4RL's today: builders and wrappers, nothing else.

D4RL's locomotion tasks are gym's Hopper/HalfCheetah/Walker2d-v2 inside a wrapper that clips actions to the box. Their
equal today is Gymnasium's -v4 (same models, reward, termination, reset noise) with `ClipAction`: MuJoCo clamps the
control by itself, but the control cost is charged on what the agent sent. Never -v5: Walker2d's right foot and
Hopper's terminal reward changed there.
"""

import warnings

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
