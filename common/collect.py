"""Make a locomotion dataset the way D4RL made its own, as HDF5 in D4RL's layout.

    python -m common.collect --env hopper --quality medium-replay --out hopper_medium_replay.hdf5

Protocol (read off the D4RL v2 files and their metadata):
  random         uniform actions in the box
  medium/expert  sampled (not mean) actions of one SAC checkpoint; whole episodes appended, cut at exactly `rows`
  medium-replay  SAC's replay up to and including the medium checkpoint
  medium-expert  the medium rows up to their last finished episode, then the expert rows
SAC is rlkit's: 256-256 ReLU, tanh-Gaussian, lr 3e-4, γ 0.99, target rate 5e-3, automatic entropy, batch 256; 1,000
steps first, then epochs of 1,000 environment steps followed by 1,000 gradient steps. A path that is still running at
the end of an epoch is cut and flagged as a timeout, as in D4RL's replay files.

`next_observations` is the true successor on every row. The files carry their recipe as attributes. They are not
D4RL's files: runs on them are filed under the file's own name. Training resumes from `--work` after a kill.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import envs, run

ENV_IDS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
MEDIUM_EPOCH = {
    "hopper": 400,
    "halfcheetah": 200,
    "walker2d": 300,
}  # from the row counts of D4RL's replay files
EXPERT_EPOCH = 1_000  # ours: D4RL's is unpublished; its full-replay files stop at 1e6 rows
FIELDS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


@dataclass(frozen=True)
class Args:
    out: Path  # HDF5 file to write; an existing file is refused
    env: Literal["hopper", "halfcheetah", "walker2d"] = "hopper"
    quality: Literal["random", "medium", "medium-replay", "medium-expert", "expert"] = "medium-replay"
    rows: int = (
        1_000_000  # of each roll-out part; medium-replay: if there are more, episodes are thinned evenly
    )
    epoch: int = 0  # SAC epoch of the checkpoint, 0 = D4RL's (medium qualities) or ours (expert)
    whole_episodes: bool = False  # never cut an episode, neither at the end of an epoch nor of the file
    seed: int = 0
    work: Path = Path("runs/collect")  # SAC training state and checkpoints, reused by later calls


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

    A fall on the very last allowed step is stored as a timeout, not a terminal, as D4RL does.
    """
    rows: list[tuple] = []
    obs, _ = env.reset(seed=seed)
    while True:
        action = np.asarray(act(obs), dtype=np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        timeout = truncated or (len(rows) + 1 == max_steps and not terminated)
        rows.append((obs, action, reward, next_obs, terminated and not timeout, timeout))
        obs = next_obs
        if terminated or timeout:
            columns = zip(FIELDS, zip(*rows, strict=True), strict=True)
            return {k: np.asarray(v, dtype=bool if k[0] == "t" else np.float32) for k, v in columns}


def concatenate(parts: list[dict[str, np.ndarray]], rows: int = sys.maxsize) -> dict[str, np.ndarray]:
    """The parts end to end, the first `rows` rows of them."""
    return {k: np.concatenate([p[k] for p in parts])[:rows] for k in FIELDS}


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


def train_sac(args: Args, env: gym.Env, epoch: int) -> tuple[Policy, dict[str, np.ndarray]]:
    """SAC up to and including epoch `epoch` -> the policy and the replay so far, in time order.

    State and a policy per finished call are kept in `args.work` and taken up again, so that `medium`, `medium-replay`
    and `expert` of one environment and seed come from one training run.
    """
    folder = args.work / args.env / f"seed{args.seed}{'-whole' if args.whole_episodes else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    snapshot, latest = folder / f"epoch{epoch}.pt", folder / "state.pt"
    torch.manual_seed(args.seed)
    sac = SAC(env.observation_space.shape[0], env.action_space.shape[0])
    replay: list[dict[str, np.ndarray]] = []
    done = -1  # last finished epoch
    for path in (snapshot, latest):
        if path.exists():
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


def collect(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """The dataset that `args` ask for, and what its attributes say of how it was made."""
    env = envs.locomotion(ENV_IDS[args.env])
    box = env.unwrapped.action_space  # ClipAction widens its own to the real line
    rng = np.random.default_rng(args.seed)
    used: dict[str, int] = {}

    def roll(act, purpose: str) -> dict[str, np.ndarray]:
        parts, count, bar = [], 0, tqdm(total=args.rows, unit="row", desc=purpose)
        while count < args.rows:
            parts.append(rollout(env, act, envs.episode_seed(args.seed, purpose, len(parts))))
            count += len(parts[-1]["rewards"])
            bar.update(len(parts[-1]["rewards"]))
        data = concatenate(parts, args.rows)
        return whole(data) if args.whole_episodes else data

    def policy_of(level: str) -> Policy:
        used[level] = args.epoch or (MEDIUM_EPOCH[args.env] if level == "medium" else EXPERT_EPOCH)
        policy, _ = train_sac(args, env, used[level])
        torch.manual_seed(args.seed + 1)
        return policy

    if args.quality == "random":
        data = roll(lambda _: rng.uniform(box.low, box.high), "random")
    elif args.quality == "medium-replay":
        used["medium"] = args.epoch or MEDIUM_EPOCH[args.env]
        _, data = train_sac(args, env, used["medium"])
        data = thin(whole(data) if args.whole_episodes else data, args.rows)
    elif args.quality == "medium-expert":
        if args.epoch:
            raise run.UsageError(
                "epoch", args.epoch, "0 with --quality medium-expert (it has two checkpoints)"
            )
        medium = whole(roll(policy_of("medium").act, "medium"))
        data = concatenate([medium, roll(policy_of("expert").act, "expert")])
    else:
        data = roll(policy_of(args.quality).act, args.quality)
    return data, {"sac_epochs": used}


def frozen_lake(path: Path, slip: float = 0.1, seed: int = 0) -> None:
    """Write DUAL's data for frozenlake-4x4 or -8x8 (the stem of `path`): everything a tabular Q-learner did.

    Step size 0.1, γ 0.99, ε from 1 to 0.3 over the first half of 30,000 (8x8: 200,000) steps, ties broken at random.
    """
    size = path.stem.split("-")[1]
    steps, limit = {"4x4": (30_000, 100), "8x8": (200_000, 200)}[size]
    env, rng = envs.FrozenLake(size, limit, slip), np.random.default_rng(seed)
    q, rows, episode, obs = np.zeros((len(env.states), 4)), [], 0, None
    for i in tqdm(range(steps), unit="row", desc=path.name, disable=None):
        if obs is None:
            obs, _ = env.reset(seed=envs.episode_seed(seed, "collect", episode))
            episode += 1
        state = obs.argmax()
        epsilon = max(0.3, 1 - 0.7 * i / (steps / 2))
        best = np.flatnonzero(q[state] == q[state].max())
        move = rng.integers(4) if rng.random() < epsilon else rng.choice(best)
        following, reward, terminated, truncated, _ = env.step(env.moves[move])
        target = reward + 0.99 * (not terminated) * q[following.argmax()].max()
        q[state, move] += 0.1 * (target - q[state, move])
        rows.append((obs, env.moves[move], reward, following, terminated, truncated and not terminated))
        obs = None if terminated or truncated else following
    columns = zip(FIELDS, zip(*rows, strict=True), strict=True)
    data = {k: np.asarray(v, dtype=bool if k[0] == "t" else np.float32) for k, v in columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, data, {"env": path.stem, "slip": slip, "seed": seed, "policy": "epsilon-greedy Q-learning"})


def write(path: Path, data: dict[str, np.ndarray], attributes: dict) -> None:
    """`data` as HDF5 in D4RL's layout; written aside, then renamed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with h5py.File(part, "w") as f:
        for k in FIELDS:
            f.create_dataset(k, data=data[k], compression="gzip", compression_opts=9, shuffle=True)
        f.attrs.update(attributes)
    part.replace(path)


def main(args: Args) -> dict[str, float]:
    """Collect, write, and print what the file holds."""
    if args.out.exists():
        raise run.UsageError("out", args.out, "a file that does not exist yet")
    if args.rows < 1 or args.epoch < 0 or args.seed < 0:
        raise run.UsageError(
            "rows, epoch, seed", (args.rows, args.epoch, args.seed), "rows >= 1, others >= 0"
        )
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise run.UsageError("out", args.out, f"a file in a folder that can be made ({e.strerror})") from e
    torch.set_num_threads(1)
    data, recipe = collect(args)
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
    settings = {k: str(v) for k, v in asdict(args).items() if k not in ("out", "work")}
    flags = [
        f"--{k.replace('_', '-')}" + ("" if v == "True" else f" {v}")
        for k, v in settings.items()
        if v != "False"
    ]
    made_by = " ".join(["python -m common.collect", *flags])
    versions = {m.__name__: m.__version__ for m in (gym, mujoco, torch, np)}
    write(
        args.out,
        data,
        {
            "made_by": made_by,
            "env_id": ENV_IDS[args.env],
            "recipe": json.dumps(settings | recipe | stats),
            "versions": json.dumps(versions),
        },
    )
    print(
        f"{args.out}: "
        + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in stats.items())
    )
    return {k: float(v) for k, v in stats.items()}


if __name__ == "__main__":
    run.main(main, Args)
