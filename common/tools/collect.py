"""Make a dataset the way D4RL made its own, as HDF5 in D4RL's layout or as a Minari dataset.

    python -m common.tools.collect --env hopper --quality medium-replay --out hopper_medium_replay.hdf5
    python -m common.tools.collect --env maze2d-large --quality controller --rows 4000000 --out maze2d_large.hdf5
    python -m common.tools.collect --env reacher --quality controller --rows 12000 --out reacher-mini-v0.hdf5
    python -m common.tools.collect --env door --quality expert --policy policies.npz --workers 8 --out door_expert.hdf5
    python -m common.tools.collect --env hopper-gravity-0.5 --quality medium --minari mine/hopper-light/medium-v0

Environments: hopper, halfcheetah, walker2d, each also shifted (as in hopper-friction-2.0, data.get_task); pen, door,
hammer, relocate; maze2d-umaze, -medium, -large; reacher. Protocol (of D4RL's files, their metadata and its issues):
  random         uniform actions in the box
  medium/expert  sampled (not mean) actions of one SAC checkpoint; whole episodes appended, cut at exactly `rows`
  medium-replay  SAC's replay up to and including the medium checkpoint
  medium-expert  the medium rows up to their last finished episode, then the expert rows
  controller     Maze2D: a PD controller follows waypoints from goal to goal (`segment`); reacher: `reach`, ours
With `--policy FILE` the sampled actions are those of a policy in a file (`read_policy`), and the quality is its level
there; Adroit's expert is such a one. Without, SAC is trained, in locomotion only.
SAC is rlkit's: 256-256 ReLU, tanh-Gaussian, lr 3e-4, γ 0.99, target rate 5e-3, automatic entropy, batch 256; 1,000
steps first, then epochs of 1,000 environment steps followed by 1,000 gradient steps. A path that is still running at
the end of an epoch is cut and flagged as a timeout, as in D4RL's replay files.

`next_observations` is the state after the step on every row. Adroit and Maze2D files have D4RL's `infos` too. The files
carry their recipe as attributes. They are not D4RL's files: runs on them are filed under the file's own name.

An episode of a roll-out depends on its number and the seed alone, so the rows do not depend on `--workers`;
medium-replay and controller use one process. Training and roll-outs are taken up again from `--work` after a kill.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import count, pairwise
from pathlib import Path
from pickle import UnpicklingError

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import envs, run
from common.data import Task, get_task
from common.files import FIELDS, minari_folder, sha256_of, write_d4rl

MEDIUM_EPOCH = {
    "hopper": 400,
    "halfcheetah": 200,
    "walker2d": 300,
}  # from the row counts of D4RL's replay files
EXPERT_EPOCH = 1_000  # ours: D4RL's is unpublished; its full-replay files stop at 1e6 rows
KEEP_EVERY = 50_000  # rows of a roll-out between two files in `--work`


@dataclass(frozen=True)
class Args:
    out: Path | None = None  # HDF5 file to write; an existing file is refused
    minari: str | None = None  # or the id of a Minari dataset to write, as in mine/hopper/medium-v0
    # robot, shifted robot (hopper-gravity-0.5), task of the hand (pen), maze (maze2d-umaze), or reacher
    env: str = "hopper"
    # random, medium, medium-replay, medium-expert, expert, controller (maze2d, reacher); with --policy, a level there
    quality: str = "medium-replay"
    policy: Path | None = None  # npz FILE of the policy to roll out; without, SAC is trained
    noisy: bool = False  # of the maze's controller: N(0, 0.5²) is added to its actions
    # of each roll-out part; medium-replay: if there are more, episodes are thinned evenly
    rows: int = 1_000_000
    epoch: int = 0  # SAC epoch of the checkpoint, 0 = D4RL's (medium qualities) or ours (expert)
    whole_episodes: bool = False  # never cut an episode, neither at the end of an epoch nor of the file
    seed: int = 0
    workers: int = 1  # processes of a roll-out
    # SAC training, its checkpoints, unfinished roll-outs; used by later calls
    work: Path = Path("runs/collect")


def task_of(env: str) -> Task:
    """The task whose environment and reference returns `--env` means; its data do not matter here."""
    robots, shifts = "hopper|halfcheetah|walker2d", "friction|gravity|kinematic|morphology"
    hands, sizes = "pen|door|hammer|relocate", "umaze|medium|large"
    if env == "reacher":
        return get_task("reacher-mini-v0")
    found = re.fullmatch(rf"({robots})(-(?:{shifts})-.+)?|(maze2d-(?:{sizes}))|({hands})", env)
    if not found:
        allowed = f"{robots}, each also with -<{shifts}>-<level>; {hands}; maze2d-<{sizes}>; reacher"
        raise run.UsageError("--env", env, allowed.replace("|", ", "))
    robot, shift, maze, hand = found.groups()
    return get_task(
        f"{robot}-medium-v2{shift or ''}" if robot else f"{maze}-v1" if maze else f"{hand}-human-v1"
    )


class Policy(nn.Module):
    """SAC's tanh-Gaussian actor: obs (B, O) -> action (B, A) in (-1, 1), log-probability (B,)."""

    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2 * act_dim)
        )

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, -1)
        log_std = log_std.clamp(-20.0, 2.0)
        eps = torch.randn_like(mean)
        u = mean + log_std.exp() * eps  # before the squash
        log_prob = -0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))  # log d tanh(u) / du
        return torch.tanh(u), log_prob.sum(-1)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """One sampled action for one observation."""
        with torch.inference_mode():
            return self(torch.as_tensor(obs, dtype=torch.float32)[None])[0][0].numpy()


class SAC:
    """Networks, optimizers and one gradient step of SAC as D4RL's runs had them."""

    def __init__(self, obs_dim: int, act_dim: int):
        def critic() -> nn.Module:
            sizes = (obs_dim + act_dim, 256, 256, 1)
            layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
            return nn.Sequential(*layers[:-1])

        self.policy = Policy(obs_dim, act_dim)
        self.nets = nn.ModuleDict({"policy": self.policy, "q1": critic(), "q2": critic()})
        self.targets = nn.ModuleDict({"q1": critic(), "q2": critic()})
        self.targets.load_state_dict({k: v for k, v in self.nets.state_dict().items() if k[0] == "q"})
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.target_entropy = -float(act_dim)
        self.pi_opt = torch.optim.Adam([*self.policy.parameters(), self.log_alpha], lr=3e-4)
        self.critics = [*self.nets["q1"].parameters(), *self.nets["q2"].parameters()]
        self.q_opt = torch.optim.Adam(self.critics, lr=3e-4)

    def update(self, obs, actions, rewards, next_obs, terminals) -> None:
        """One SAC step on a batch of (B, ·) tensors; rewards and terminals are (B,)."""
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_actions, next_log_prob = self.policy(next_obs)
            x = torch.cat([next_obs, next_actions], -1)
            q_next = torch.minimum(self.targets["q1"](x), self.targets["q2"](x)).squeeze(-1)
            td_target = rewards + 0.99 * (1 - terminals) * (q_next - alpha * next_log_prob)
        x = torch.cat([obs, actions], -1)
        q_loss = sum(F.mse_loss(self.nets[k](x).squeeze(-1), td_target) for k in ("q1", "q2"))
        self.q_opt.zero_grad()
        q_loss.backward()
        self.q_opt.step()
        new_actions, log_prob = self.policy(obs)
        x = torch.cat([obs, new_actions], -1)
        q = torch.minimum(self.nets["q1"](x), self.nets["q2"](x)).squeeze(-1)
        entropy_gap = (log_prob + self.target_entropy).detach().mean()
        self.pi_opt.zero_grad()
        ((alpha * log_prob - q).mean() - self.log_alpha * entropy_gap).backward()
        self.pi_opt.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.targets.parameters()], self.critics, 5e-3)

    def state_dict(self) -> dict:
        parts = {k: getattr(self, k).state_dict() for k in ("nets", "targets", "pi_opt", "q_opt")}
        return parts | {"log_alpha": self.log_alpha.detach().clone()}

    def load_state_dict(self, state: dict) -> None:
        for k in ("nets", "targets", "pi_opt", "q_opt"):
            getattr(self, k).load_state_dict(state[k])
        self.log_alpha.data.copy_(state["log_alpha"])


def rollout(env: gym.Env, act, seed: int, max_steps: int = sys.maxsize) -> dict[str, np.ndarray]:
    """One episode as arrays of (T, ·), T <= max_steps; a cut at `max_steps` is flagged as a timeout.

    A fall on the very last allowed step is stored as a timeout, not a terminal, as D4RL does. Adroit's have the
    simulator's state before each step as `infos/...`.
    """
    rows, states = [], []
    state = getattr(env.unwrapped, "get_env_state", dict)
    obs, _ = env.reset(seed=seed)
    while True:
        action = np.asarray(act(obs), dtype=np.float32)
        states.append({f"infos/{k}": v for k, v in state().items()})
        next_obs, reward, terminated, truncated, _ = env.step(action)
        timeout = truncated or (len(rows) + 1 == max_steps and not terminated)
        rows.append((obs, action, reward, next_obs, terminated and not timeout, timeout))
        obs = next_obs
        if terminated or timeout:
            return columns_of(rows, states)


def columns_of(rows: list[tuple], states: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows in the order of FIELDS, and the `infos` of each, as arrays (T, ·): float32, flags bool."""
    columns = dict(zip(FIELDS, zip(*rows, strict=True), strict=True))
    columns |= {k: [s[k] for s in states] for k in states[0]}
    return {k: np.asarray(v, dtype=bool if k[0] == "t" else np.float32) for k, v in columns.items()}


def concatenate(parts: list[dict[str, np.ndarray]], rows: int = sys.maxsize) -> dict[str, np.ndarray]:
    """The parts end to end, the first `rows` rows of them."""
    return {k: np.concatenate([p[k] for p in parts])[:rows] for k in parts[0]}


def whole(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`data` up to its last finished episode."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    return {k: v[: ends[-1] + 1 if len(ends) else 0] for k, v in data.items()}


def thin(data: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Episodes spread evenly over `data`, in their order, at most `rows` rows of them; all if they fit."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    starts, total = np.concatenate([[0], ends[:-1]]), len(data["rewards"])
    if total <= rows:
        return data
    kept, seen = [], 0
    for start, end in zip(starts, ends, strict=True):
        seen += end - start
        if sum(map(len, kept)) + end - start <= seen * rows / total:
            kept.append(np.arange(start, end))
    kept = kept or [np.arange(0)]
    return {k: v[np.concatenate(kept)] for k, v in data.items()}


@contextmanager
def whole_file(path: Path) -> Iterator[None]:
    """What is read in here is a file of `--work`; UsageError if it is damaged."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError, EOFError, UnpicklingError, zipfile.BadZipFile) as e:
        allowed = "whole files of unfinished work; remove this one to do its part again"
        raise run.UsageError("--work", f"{path} damaged ({type(e).__name__})", allowed) from e


def train_sac(args: Args, env: gym.Env, epoch: int) -> tuple[Policy, dict[str, np.ndarray]]:
    """SAC up to and including epoch `epoch` -> the policy and the replay so far, in time order.

    State and a policy per finished call are kept in `args.work` and taken up again, so that `medium`, `medium-replay`
    and `expert` of one environment and seed come from one training run.
    """
    folder = args.work / args.env / f"seed{args.seed}{'-whole' if args.whole_episodes else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    snapshot, latest = folder / f"epoch{epoch}.pt", folder / "latest.pt"
    torch.manual_seed(args.seed)
    sac = SAC(env.observation_space.shape[0], env.action_space.shape[0])
    replay: list[dict[str, np.ndarray]] = []
    done = -1  # last finished epoch
    for path in (snapshot, latest):
        if path.exists():
            with whole_file(path):
                state = torch.load(path, weights_only=False)
            if state["epoch"] <= epoch:
                sac.load_state_dict(state["sac"])
                replay, done = [state["replay"]], state["epoch"]
                torch.set_rng_state(state["rng"])
                break

    def save(path: Path) -> None:
        state = {"sac": sac.state_dict(), "epoch": done, "rng": torch.get_rng_state()}
        run.save_atomically(state | {"replay": concatenate(replay)}, path)

    def explore(steps: int, first_seed: int) -> None:
        start = sum(len(p["rewards"]) for p in replay)
        while (left := start + steps - sum(len(p["rewards"]) for p in replay)) > 0:
            seed = envs.episode_seed(args.seed, "collect", first_seed + left)
            limit = sys.maxsize if args.whole_episodes else left
            replay.append(rollout(env, sac.policy.act, seed, limit))

    for i in tqdm(range(done + 1, epoch + 1), initial=done + 1, total=epoch + 1, unit="epoch", desc="sac"):
        if i == 0:
            explore(1_000, 0)
        explore(1_000, 10_000 * (i + 1))
        replay = [concatenate(replay)]
        table = {k: torch.from_numpy(v).float() for k, v in replay[0].items()}
        for _ in range(1_000):
            rows = torch.randint(len(table["rewards"]), (256,))
            sac.update(*(table[k][rows] for k in FIELDS[:5]))
        done = i
        if i % 10 == 0:
            save(latest)
    save(snapshot)
    return sac.policy, concatenate(replay)


# ---- roll-outs of a fixed policy ----


def standard(kind: str, hidden: str, w: dict[str, np.ndarray]) -> dict:
    """Weights (out, in) under their names in a policy file -> all that `sample` needs, float32."""
    full = {
        "mean": w.get("in_shift", w.get("obs_mean", 0.0)),
        "std": w["in_scale"] + 1e-8 if "in_scale" in w else w.get("obs_std", 1.0),
        "clip": w.get("obs_clip", np.inf),
        "out_shift": w.get("out_shift", 0.0),
        "out_scale": w.get("out_scale", 1.0),
        **{k: w[k] for k in ("w0", "b0", "w1", "b1", "w2", "b2")},
        "w_log_std": w["w_log_std"] if kind == "tanh_gaussian" else np.zeros_like(w["w2"]),
        "b_log_std": w["b_log_std" if kind == "tanh_gaussian" else "log_std"],
    }
    return {"kind": kind, "hidden": hidden} | {k: np.asarray(v, np.float32) for k, v in full.items()}


def weights(policy: Policy) -> dict:
    """SAC's actor for `sample`."""
    w0, b0, w1, b1, w2, b2 = (x.detach().numpy().copy() for x in policy.parameters())
    a = len(b2) // 2
    head = {"w2": w2[:a], "b2": b2[:a], "w_log_std": w2[a:], "b_log_std": b2[a:]}
    return standard("tanh_gaussian", "relu", {"w0": w0, "b0": b0, "w1": w1, "b1": b1} | head)


def sample(policy: dict, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One action (A,) in [-1, 1] for one obs (O,): a Gaussian whose mean has two hidden layers, squashed or clipped.

    No BLAS: its sums depend on how many threads there are.
    """
    p, dot = policy, partial(np.einsum, "oi,i->o")
    x = ((obs - p["mean"]) / p["std"]).clip(-p["clip"], p["clip"]).astype(np.float32)
    for i in "01":
        x = dot(p["w" + i], x) + p["b" + i]
        x = np.tanh(x) if p["hidden"] == "tanh" else np.maximum(x, 0)
    mean = (dot(p["w2"], x) + p["b2"]) * p["out_scale"] + p["out_shift"]
    log_std = dot(p["w_log_std"], x) + p["b_log_std"]
    noise = rng.standard_normal(len(mean))
    if p["kind"] == "gaussian_clip":
        return (mean + np.exp(log_std) * noise).clip(-1, 1)
    return np.tanh(mean + np.exp(log_std.clip(-20, 2)) * noise)


def read_policy(path: Path, task: Task, key: str) -> tuple[dict, dict]:
    """The policy under `key` of an npz file, for `sample`; and where it is from.

    Arrays `<key>/w0` (H, O), `b0`, `w1`, `b1`, `w2` (A, H), `b2`, and `meta_json`, bytes of JSON: {"kind": ...,
    "hidden_activation": "tanh" or "relu"} for all keys or by key. Kinds: tanh_gaussian with `w_log_std` (A, H),
    `b_log_std`; gaussian_clip with `log_std` (A,) and, if need be, `obs_mean`, `obs_std`, `obs_clip` or `in_shift`,
    `in_scale`, `out_shift`, `out_scale`.
    """

    def refuse(got: str, allowed: str) -> run.UsageError:
        return run.UsageError("--policy", f"{path} {got}", allowed)

    try:
        with np.load(path) as f:
            facts = json.loads(f["meta_json"].tobytes())
            there = sorted({k.rpartition("/")[0] for k in f.files} - {""})
            w = {k[len(key) + 1 :]: f[k] for k in f.files if k.rpartition("/")[0] == key}
        facts = facts.get(key, facts)
        kind, hidden, made_in = (facts.get(k) for k in ("kind", "hidden_activation", "env"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as e:
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        raise refuse(f"unreadable ({reason})", "an npz file of policies with their meta_json") from e
    if not w:
        raise refuse(f"without {key}", f"a --env and --quality it has: {', '.join(there)}")
    if kind not in ("tanh_gaussian", "gaussian_clip") or hidden not in ("tanh", "relu"):
        raise refuse(
            f"of kind {kind}, {hidden}", "tanh_gaussian or gaussian_clip; hidden layers tanh or relu"
        )
    if made_in and made_in != (env_id := name_of(task.make())):
        raise refuse(f"made in {made_in}", f"one made in {env_id}")
    try:
        policy = standard(kind, hidden, w)
        action = sample(policy, np.zeros(task.obs_dim), np.random.default_rng(0))
        finite = np.isfinite(np.concatenate([v.ravel() for k, v in w.items() if k != "obs_clip"])).all()
        fits = finite and w.get("obs_clip", 1) > 0 and action.shape == (task.act_dim,)
    except (LookupError, ValueError, TypeError):
        fits = False
    if not fits:
        allowed = f"finite arrays as {kind} needs them, obs {task.obs_dim}, actions {task.act_dim}"
        raise refuse(f"with {', '.join(f'{k} {v.shape}' for k, v in w.items())}", allowed)
    origin = {"policy_key": key, "policy_sha256": sha256_of(path), "policy_source": facts.get("source")}
    return policy, origin


@cache
def _env(name: str) -> gym.Env:
    return task_of(name).make()


def episode(name: str, seed: int, purpose: str, policy: dict | None, i: int) -> dict[str, np.ndarray]:
    """Episode `i` of `policy` (None: uniform) in the environment called `name`; depends on the arguments alone."""
    env = _env(name)
    box = env.unwrapped.action_space  # ClipAction widens its own to the real line
    rng = np.random.default_rng(envs.episode_seed(seed, f"{purpose} actions", i))
    act = (lambda obs: sample(policy, obs, rng)) if policy else (lambda _: rng.uniform(box.low, box.high))
    if purpose == "controller":
        act = partial(reach, rng.uniform(0, 60), rng.uniform(0.02, 0.06), rng)
    return rollout(env, act, envs.episode_seed(seed, purpose, i))


def reach(gain: float, damping: float, rng: np.random.Generator, obs: np.ndarray) -> np.ndarray:
    """Torques (2,) that pull Reacher's fingertip to its target like a spring, damped and with N(0, 0.3²) on each.

    The spring's force in Cartesian space times the arm's Jacobian (links of 0.1 and 0.11 m), less damping times the
    joints' speeds. With gains below 10 the arm is slow, above 40 it oscillates: a mixture of middling skills.
    """
    (c1, c2, s1, s2), speed, force = obs[:4], obs[6:8], -gain * obs[8:10]
    second = 0.11 * np.array(
        [-(s1 * c2 + c1 * s2), c1 * c2 - s1 * s2]
    )  # from the elbow to the fingertip, turned
    first = 0.1 * np.array([-s1, c1]) + second
    torque = np.array([first @ force, second @ force]) - damping * speed
    return (torque + 0.3 * rng.standard_normal(2)).clip(-1, 1)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def episodes(args: Args, purpose: str, policy: dict | None, first: int) -> Iterator[dict[str, np.ndarray]]:
    """Episodes number `first`, `first` + 1, ... in this order, computed by `args.workers` processes."""
    job = partial(episode, args.env, args.seed, purpose, policy)
    if args.workers == 1:
        yield from map(job, count(first))
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        ahead = first + 2 * args.workers
        waiting = deque(pool.submit(job, i) for i in range(first, ahead))
        for i in count(ahead):
            yield waiting.popleft().result()
            waiting.append(pool.submit(job, i))
    finally:
        pool.shutdown(cancel_futures=True)


def route(walls: np.ndarray, start: tuple[int, int], goal: tuple[int, int]) -> list[tuple[int, int]]:
    """Cells of a shortest path through walls (rows, columns), without `start`, with `goal`."""
    toward, queue = {goal: goal}, deque([goal])
    while queue:
        i, j = queue.popleft()
        for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if not walls[cell] and cell not in toward:
                toward[cell] = (i, j)
                queue.append(cell)
    path = [toward[start]]
    while path[-1] != goal:
        path.append(toward[path[-1]])
    return path


class Pilot:
    """D4RL's controller of the maze's ball: steers at one waypoint after the other, the last of them the goal's cell.

    The others are the cells (row, column) on the way, each less U(0, 0.2) m on both axes.
    """

    def __init__(self, walls: np.ndarray, place: np.ndarray, goal: np.ndarray, rng: np.random.Generator):
        """From the free cell nearest to `place` (2,) to that of `goal` (2,), both in metres."""
        free = np.argwhere(~walls)
        self.target = np.round(goal).astype(int)
        self.last = start = free[np.square(free - place).sum(1).argmin()]
        path = [np.array(cell) for cell in route(walls, tuple(start.tolist()), tuple(self.target.tolist()))]
        self.waypoints = deque([*(cell - rng.uniform(0, 0.2, 2) for cell in path[:-1]), self.target])

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, bool]:
        """Action (2,) in [-1, 1] for an observation (4,), and whether the ball is at rest at the target."""
        place, speed = obs[:2], obs[2:]
        slow = math.dist(place, self.last) < 0.1
        there = slow and math.dist(place, self.target) < 0.1
        aim = self.target if there else self.waypoints[0]
        if slow and len(self.waypoints) > 1 and math.dist(place, aim) < 0.1:
            self.waypoints.popleft()
        self.last = place
        return (10 * (aim - place) - speed).clip(-1, 1), there


def segment(
    env: envs.Maze2D, limit: int, noisy: bool, seed: int, before: dict | None
) -> dict[str, np.ndarray]:
    """The way to one random goal, as D4RL's controller goes it, from where the rows `before` left the ball.

    On arrival, or after `limit` steps, a timeout is flagged and a new goal drawn. Three things are D4RL's, intended or
    not: the first row sees, and stores, the observation that the last row already had (its `next_observations` and
    `infos` are the simulator's); the reward is that of the maze's own goal; and it belongs to the observation before
    the step.
    """
    first, _ = env.reset(seed=seed)  # also forgets the contacts: what follows depends on the arguments alone
    rng, seen = env.np_random, first
    if before is not None:
        seen, now = before["observations"][-1], np.float64(before["next_observations"][-1])
        env.set_state(now[:2], now[2:])
    free = np.argwhere(~env.walls)
    goal = free[rng.integers(len(free))] + rng.uniform(-0.1, 0.1, 2)
    pilot = Pilot(env.walls, seen[:2], goal, rng)
    rows, states, over = [], [], False
    while not over:
        action, there = pilot.act(seen)
        if noisy:
            action = (action + 0.5 * rng.standard_normal(2)).clip(-1, 1)
        over = there or len(rows) == limit
        states.append(
            {"infos/goal": goal, "infos/qpos": env.data.qpos.copy(), "infos/qvel": env.data.qvel.copy()}
        )
        next_obs, *_ = env.step(np.float32(action))
        rows.append((seen, action, math.dist(seen[:2], env.goal) <= 0.5, next_obs, False, over))
        seen = next_obs
    return columns_of(rows, states)


def segments(args: Args, task: Task, first: int, before: dict | None) -> Iterator[dict[str, np.ndarray]]:
    """The controller's ways number `first`, `first` + 1, ...; `before` ends with the last row of the one before."""
    env = task.make().unwrapped
    for i in count(first):
        seed = envs.episode_seed(args.seed, "controller", i)
        before = segment(env, task.limit, args.noisy, seed, before)
        yield before


def roll(
    args: Args, task: Task, purpose: str, policy: dict | None = None
) -> tuple[dict[str, np.ndarray], Path]:
    """Episodes 0, 1, 2, ... end to end, cut at exactly `args.rows`; and the folder in which they are kept meanwhile.

    A file there has the episodes from the one it is named after on. What they depend on names the folder.
    """
    facts = repr((args.env, purpose, args.seed, args.noisy, versions())).encode()
    digest = hashlib.sha256(
        facts + b"".join(np.asarray(v).tobytes() for v in (policy or {}).values())
    ).hexdigest()
    folder = args.work / args.env / f"{purpose}-{digest[:12]}"
    parts, fresh, finished, rows = [], [], 0, 0
    while rows < args.rows and (path := folder / f"{finished}.npz").exists():
        with whole_file(path), np.load(path) as f:
            parts.append({k: f[k] for k in f.files})
        finished += int((parts[-1]["terminals"] | parts[-1]["timeouts"]).sum())
        rows += len(parts[-1]["rewards"])
    stored = rows
    if purpose == "controller" and args.env != "reacher":
        source = segments(args, task, finished, parts[-1] if parts else None)
    else:
        source = episodes(args, purpose, policy, finished)
    with (
        closing(source),
        tqdm(total=args.rows, initial=min(rows, args.rows), unit="row", desc=purpose) as bar,
    ):
        while rows < args.rows:
            fresh.append(next(source))
            bar.update(min(len(fresh[-1]["rewards"]), args.rows - rows))
            rows += len(fresh[-1]["rewards"])
            if rows - stored >= KEEP_EVERY:
                parts.append(concatenate(fresh))
                np.savez(content := io.BytesIO(), **parts[-1])
                folder.mkdir(parents=True, exist_ok=True)
                run.write_atomically(content.getbuffer(), folder / f"{finished}.npz")
                finished, stored, fresh = finished + len(fresh), rows, []
    data = concatenate(parts + fresh, args.rows)
    return whole(data) if args.whole_episodes else data, folder


# ---- the dataset ----


def plan(args: Args) -> tuple[Task, dict[str, dict], dict]:
    """The task; by level, the policies of `--policy`, and their origin. Raises UsageError for what does not fit."""
    task, robot, quality = task_of(args.env), args.env.split("-")[0], args.quality
    if (args.out is None) == (args.minari is None):
        raise run.UsageError("--out, --minari", f"{args.out}, {args.minari}", "exactly one of the two")
    if args.out and args.out.exists():
        raise run.UsageError("out", args.out, "a file that does not exist yet")
    if args.minari is not None:
        from minari.dataset.minari_dataset import DATASET_ID_RE  # half a second, for those who ask for it

        if not DATASET_ID_RE.fullmatch(args.minari) or (minari_folder() / args.minari).exists():
            allowed = f"an id as in mine/hopper/medium-v0 that is not in {minari_folder()} yet"
            raise run.UsageError("--minari", args.minari, allowed)
    if args.rows < 1 or args.workers < 1 or args.epoch < 0 or args.seed < 0:
        got = (args.rows, args.workers, args.epoch, args.seed)
        raise run.UsageError("rows, workers, epoch, seed", got, "rows and workers >= 1, others >= 0")
    if args.epoch and (args.policy or quality == "medium-expert"):
        allowed = "0 with --policy, and with --quality medium-expert (it has two checkpoints)"
        raise run.UsageError("epoch", args.epoch, allowed)
    if args.noisy and (quality != "controller" or robot != "maze2d"):
        raise run.UsageError("--noisy", f"--quality {quality}", "the controller of maze2d")
    trained = ("medium", "medium-replay", "medium-expert", "expert") if robot in MEDIUM_EPOCH else ()
    if args.policy is None:
        known = ("random", "controller") if robot in ("maze2d", "reacher") else ("random", *trained)
        if quality not in known:
            more = "; another one with --policy" if "controller" not in known else ""
            raise run.UsageError("--quality", f"{quality} for {args.env}", ", ".join(known) + more)
        return task, {}, {}
    if robot in ("maze2d", "reacher") or quality in ("random", "medium-replay", "controller"):
        raise run.UsageError("--policy", f"{args.policy} for {args.env} {quality}", "none for it")
    if not trained and quality != "expert":
        raise run.UsageError("--quality", f"{quality} for {args.env} with --policy", "expert")
    policies, origins = {}, {}
    for level in ("medium", "expert") if quality == "medium-expert" else (quality,):
        key = f"{robot}/{level}" if trained else robot
        policies[level], origins[level] = read_policy(args.policy, task, key)
    return task, policies, {"policies": origins}


def collect(
    args: Args, task: Task, policies: dict[str, dict]
) -> tuple[dict[str, np.ndarray], dict, list[Path]]:
    """The dataset that `args` ask for, what its attributes say of its making, and the folders it leaves behind."""
    used, folders = {}, []

    def rolled(purpose: str, policy: dict | None = None) -> dict[str, np.ndarray]:
        data, folder = roll(args, task, purpose, policy)
        folders.append(folder)
        return data

    def trained(level: str) -> tuple[Policy, dict[str, np.ndarray]]:
        first_choice = MEDIUM_EPOCH[args.env.split("-")[0]] if level == "medium" else EXPERT_EPOCH
        used[level] = args.epoch or first_choice
        return train_sac(args, task.make(), used[level])

    def policy_of(level: str) -> dict:
        return policies.get(level) or weights(trained(level)[0])

    if args.quality in ("random", "controller"):
        data = rolled(args.quality)
    elif args.quality == "medium-replay":
        _, data = trained("medium")
        data = thin(whole(data) if args.whole_episodes else data, args.rows)
    elif args.quality == "medium-expert":
        medium = whole(rolled("medium", policy_of("medium")))
        data = concatenate([medium, rolled("expert", policy_of("expert"))])
    else:
        data = rolled(args.quality, policy_of(args.quality))
    return data, {"sac_epochs": used}, folders


def write_minari(name: str, args: Args, task: Task, data: dict[str, np.ndarray], attributes: dict) -> None:
    """`data` as a Minari dataset with D4RL's reference returns, and its environment if that is Gymnasium's own.

    Elsewhere (D4RL's Adroit, Maze2D, shifted dynamics) Minari could only recover another one: it gets the spaces.
    """
    import minari
    from minari.data_collector import EpisodeBuffer

    stops, buffers = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1, []
    for rows in np.split(np.arange(len(data["rewards"])), stops):
        if len(rows):
            obs, acts, rewards, next_obs, terminals, timeouts = (data[k][rows] for k in FIELDS)
            timeouts[-1] |= not terminals[-1]  # the last episode, if the file's end cuts it
            buffers.append(
                EpisodeBuffer(
                    id=len(buffers), observations=np.concatenate([obs, next_obs[-1:]]), actions=acts,
                    rewards=rewards, terminations=terminals, truncations=timeouts,
                )
            )  # fmt: skip
    known = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float32),
        "action_space": gym.spaces.Box(-1, 1, (task.act_dim,), np.float32),
    }
    if args.env in MEDIUM_EPOCH:
        known = {"env": attributes["env_id"]}
    description = "; ".join(f"{k}: {v}" for k, v in attributes.items())
    scores = {"ref_min_score": task.ref_min, "ref_max_score": task.ref_max}
    with envs.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about authors and links
        try:
            written = minari.create_dataset_from_buffers(
                name, buffers, algorithm_name=args.quality, description=description, **known
            )
            written.storage.update_metadata(
                scores
            )  # as an argument it is dropped where there is no environment
        except BaseException:
            shutil.rmtree(minari_folder() / name, ignore_errors=True)
            raise


def versions() -> dict[str, str]:
    return {m.__name__: m.__version__ for m in (gym, mujoco, torch, np)}


def name_of(env: gym.Env) -> str:
    """Gymnasium's id, or the class of an environment of ours."""
    body = env.unwrapped
    return body.spec.id if body.spec else type(body).__name__


def main(args: Args) -> dict[str, float]:
    """Collect, write, and print what the file holds."""
    task, policies, origins = plan(args)
    if args.out:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            allowed = f"a file in a folder that can be made ({e.strerror})"
            raise run.UsageError("out", args.out, allowed) from e
    torch.set_num_threads(1)
    data, recipe, folders = collect(args, task, policies)
    if not len(data["rewards"]):
        raise run.UsageError("rows", args.rows, "room for at least one whole episode")
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    returns = np.array([r.sum() for r in np.split(data["rewards"], ends)[: len(ends)]], dtype=np.float64)
    stats = {
        "rows": len(data["rewards"]),
        "episodes": len(ends),
        "terminals": int(data["terminals"].sum()),
        "timeouts": int(data["timeouts"].sum()),
        "return_mean": float(returns.mean()) if len(ends) else float("nan"),
        "return_max": float(returns.max()) if len(ends) else float("nan"),
    }
    kept_out = ("out", "minari", "work", "workers")  # the rows do not depend on them
    settings = {k: str(v) for k, v in asdict(args).items() if k not in kept_out and v is not None}
    if args.policy:
        settings["policy"] = args.policy.name
    flags = [
        f"--{k.replace('_', '-')}" + ("" if v == "True" else f" {v}")
        for k, v in settings.items()
        if v != "False"
    ]
    attributes = {
        "made_by": " ".join(["python -m common.tools.collect", *flags]),
        "env_id": name_of(task.make()),
        "recipe": json.dumps(settings | recipe | origins | stats),
        "versions": json.dumps(versions()),
    }
    if args.out:
        write_d4rl(args.out, data, attributes)
    else:
        write_minari(args.minari, args, task, data, attributes)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{args.out or args.minari}: "
        + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in stats.items())
    )
    return {k: float(v) for k, v in stats.items()}


if __name__ == "__main__":
    run.main(main, Args)
