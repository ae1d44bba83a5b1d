"""Diffuser, offline and then online: a diffusion model draws plans, a learned return guides them, the best is begun.

Paper    Janner, Du, Tenenbaum, Levine, "Planning with Diffusion for Flexible Behavior Synthesis", ICML 2022, arXiv
         2205.09991: Alg., § below; its public code where that is silent: [code]. DUAL (Bui et al., arXiv
         2605.30776v1) fine-tunes it online and distils it as D-Diffuser; how is left open there, and its numbers are
         lost, but that H and T follow Lu et al., ICLR 2025. CleanDiffuser (Dong et al., 2024): guidance scales.
         Distillation: Salimans, Ho, ICLR 2022, arXiv 2202.00512.
Idea     One model of whole windows of actions and states is dynamics and behavior at once: a plan is drawn with its
         first state known, as a picture is in-painted. What is good is said by another model, the return of noised
         windows, whose gradient moves each denoising step. No policy and no bootstrap: data say what follows, returns
         are the episodes' own. The first action of the best plan is executed, then all is planned anew.
Symbols  τ window of H = horizon steps, each [a, s] | u noise level, angle φ = π u / 2 | z noised window | v what the
         planner predicts | T denoise_steps | Σ variance of a denoising step | J guide, return of a noised window | ω
         guide_scale | γ gamma | R return-to-go, the label of J
Read     Args, ENV_PRESETS, dual.py's planner, returns, ReturnGuide, guided_plans, pick_actions, (PlanDistiller),
         train; what is in brackets only --distill needs
Notes    D50, U50, U53 as in dual.py: v and a cosine schedule, its network, its in-painting.
         D120 the code predicts the clean window and has its L2, at T levels; here v at all levels, as dual.py: the same
            error weighted by 1 + SNR; one planner for any T, and one that can be distilled.
         D121 networks: temporal U-Nets; here dual.py's MLP for planner and guide; actions are not z-scored.
         D122 H: 32 in the paper (HalfCheetah 4), here 4 and in AntMaze 40 at stride 1 (25 there), T 20, as DUAL has it
            after Lu et al.
         D123 1M steps of 64 windows there; here 500k of 256, at the code's rate.
         D124 the plans' noise, first and added, times 0.5, as CleanDiffuser does with the first; ω are its values, too.
         U51 windows: from every row, the padded end of an episode without loss on actions, as in dual.py.
         U52 averages, of planner and guide, which plan with them: the code's, first plain means; halvings: dual.py's.
         U120 returns: of the row to its episode's end, where a termination costs 100 [code]; in AntMaze a missed goal
            does [CleanDiffuser], which is -1 a step for ever, and the rewards are r - 1; cut off, they end as they are.
         U121 online: one planner and one guide step per environment step on dataset and own rows alike; an episode's
            windows count when it is over; optimizer, average and rate go on; warm-up as in every file.
         U122 online plans are drawn as in evaluation.
         U123 tasks without a published row: robots as their medium, Adroit at the code's default scale, Maze2D as
            AntMaze with its own rewards; Frozen-Lake: sizes of dual.py.
         U124 J is learned in units of the labels' std; the plan that is followed has the best J at u = 0.
         U125 --distill: 32 steps halved to one before the online phase as dual.py's; one step cannot be guided, so J
            only picks. Online the planner learns on, and the student is pulled to the planner's plans from its noise.
         U1 mini tasks: sizes that finish in minutes on a CPU core; not a published setting.
Metrics  loss/planner; loss/guide, in units of the labels' variance: 1 knows nothing; guide/bias, mean of J - R in their
         std; loss/distill, loss/follow; distill/error, student and planner from the same noise; eval/score normalised.
Run      python algorithms/diffuser.py --env hopper-medium-v2 --seed 0
         unguided: --guide-repeats 0 | plain sampling: --plans 1 | the paper's H: --horizon 32 | D-Diffuser: --distill
Cost     mini tasks: 2 to 4 CPU minutes. Published sizes want a GPU (not measured there): on one core 15 gradient
         steps a second of planner or guide, 0.7 s an action, 0.75 s a step of --distill online.
Fails    J sees little of an action in 4 steps: more --temperature or --plans may score less, ω three times too large
         loses half (hopper-mini-v0). Online it gains 0 to 3 (reacher-mini-v0): own rows are few, the planner has all.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, run
from common.buffer import ReplayBuffer
from common.run import Count, Natural, Number, Positive, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 500_000  # gradient steps: D123
    online_steps: Natural = 1_000_000  # environment steps [DUAL; CORL]
    from_offline: Path | None = None  # run directory (or its offline.pt) to take the offline phase from
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it works
    compile: bool | None = None  # compile and capture the gradient step; default: on for cuda, off for cpu
    out_dir: Path = Path("runs")  # the run lives in <out-dir>/<file>/<env>/seed<seed>
    overwrite: bool = False  # start anew instead of resuming
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to the run directory, for TensorBoard
    eval_every: Count = 5_000  # steps of the running phase [CORL]
    eval_episodes: Count = 10  # episodes of an evaluation [CORL]
    # planner
    horizon: Count = 4  # H, steps of a window [DUAL: Lu et al.]: D122
    normalize_windows: bool = True  # states of windows in units of their std [code]
    planner_batch: Count = 256  # windows: D123
    planner_width: Count = 512  # of the residual blocks [dual.py]: D121
    planner_blocks: Natural = 3  # residual blocks [dual.py]: D121
    lr: Positive = 2e-4  # Adam, all networks [code]
    action_weight: Positive = 10.0  # of the first action in the planner's loss [code]
    denoise_steps: Count = 20  # T, of the chain [code; DUAL: Lu et al.]
    temperature: Weight = 0.5  # factor of a plan's noise: D124
    # guide
    guide_steps: Natural = 200_000  # gradient steps of the guide, before the planner's [code]
    gamma: Share = 0.997  # discount [code, planning]
    reward_bias: Number = 0.0  # added to rewards in training, after scaling
    terminal_reward: Number = -100.0  # added to the reward of a step that terminates [code]: U120
    cutoff_reward: Number = 0.0  # added to the last reward of an episode that does not terminate: U120
    guide_scale: Weight = 0.3  # ω [CleanDiffuser, per task]: D124
    guide_repeats: Natural = 2  # steps along the gradient of J per denoising step [code]
    guide_stop: Natural = 2  # last denoising steps that are not guided [code, per task]
    plans: Count = 64  # plans per state, of which the best is followed [code]
    # D-Diffuser: U125
    distill: bool = False  # a chain that halves to one step before the online phase [DUAL: D-Diffuser]
    distill_from: Several = 32  # T of that chain, a power of two
    halving_steps: Count = 20_000  # gradient steps per halving, twice as many to 2 and 1 denoising steps
    distill_lr: Positive = 3e-4  # Adam, linear to 0 in each halving [dual.py]
    # online: U121
    warmup_steps: Natural = 5_000  # environment steps without updates, counted in online_steps
    utd: Count = 1  # gradient steps per environment step


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    # [ω: CleanDiffuser, guide_stop: code]; robots' rows are those of medium, which others go by: U123
    "hopper-medium-replay": dict(guide_scale=0.2),
    "hopper-medium-expert": dict(guide_scale=1e-5, guide_stop=4),
    "halfcheetah-": dict(guide_scale=1e-4, guide_stop=4),
    "walker2d-": dict(guide_scale=0.007),
    "walker2d-medium-replay": dict(guide_scale=0.01),
    "walker2d-medium-expert": dict(guide_scale=0.001),
    "antmaze-": dict(  # [DUAL: Lu et al.; CleanDiffuser]: D122, U120
        horizon=40, gamma=0.99, reward_bias=-1.0, terminal_reward=0.0, cutoff_reward=-100.0, guide_scale=0.001,
        eval_every=10_000, eval_episodes=100,
    ),
    **{k: dict(guide_scale=0.1, gamma=0.99) for k in ("pen-", "door-", "hammer-", "relocate-")},  # [code]: U123
    "maze2d-": dict(horizon=40, gamma=0.99, guide_scale=0.001, eval_episodes=100),  # U123
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, planner_width=64, planner_blocks=1, lr=1e-3,
        denoise_steps=5, temperature=0.2, guide_scale=1.0, guide_repeats=1, guide_stop=1, plans=4, gamma=0.99,
        distill_from=8, halving_steps=300, distill_lr=1e-3,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, guide_steps=4_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, guide_steps=4_000, eval_episodes=50),
    "frozenlake-": dict(  # [dual.py]: U123
        offline_steps=5_000, guide_steps=5_000, online_steps=20_000, warmup_steps=2_000, eval_every=500,
        eval_episodes=1, normalize_windows=False, planner_width=128, planner_blocks=2, gamma=0.99,
        terminal_reward=0.0, guide_scale=1.0, halving_steps=1_500,
    ),
    "frozenlake-8x8": dict(horizon=8),  # a longer way: U123
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "horizon", "normalize_windows", "planner_batch", "planner_width", "planner_blocks", "lr",
    "action_weight", "guide_steps", "gamma", "reward_bias", "terminal_reward", "cutoff_reward",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "guide_repeats > 0": ("guide_scale", "guide_stop"),
    "distill": ("distill_from", "halving_steps", "distill_lr"),
}


# --- shared: dual.planner ---
EMA_START, EMA_EVERY, EMA_DECAY = 2_000, 10, 0.995  # the planner's average; gradient steps [Diffuser]: U52
SHRUNK = 0.25  # share of the last halving's pure noise that is shrunk towards the actor's zero latent: U52


class Windows:
    """Windows of H = horizon steps [a, s], one from each row of a buffer's dataset, made on the device.  [Eq. 2]: U51

    Actions as they are; states in units of their std (+ 1e-3) from their mean over the dataset as the agent sees it, or
    as they are too. Past an episode's end stand its last next state and zero actions, the latter without loss, and
    both where that state is not known (a terminal row whose s' is s: files without next_observations).
    """

    def __init__(self, buffer: ReplayBuffer, ends: np.ndarray, horizon: int, normalize: bool = True):
        """`buffer` holds the dataset; ends (N,) bool marks each episode's last row; the very last row is one anyway."""
        device, n = buffer.table.device, len(ends)
        stops = np.union1d(np.flatnonzero(ends), [n - 1])
        last = stops[np.searchsorted(stops, np.arange(n))]  # of the row's episode
        self.last = torch.from_numpy(last).to(device)
        self.buffer, self.offsets = buffer, torch.arange(horizon, device=device)
        self.rows = torch.tensor(n, device=device)  # of the dataset: those that `draw` draws from
        std, mean = torch.std_mean(buffer.obs.double(), 0, correction=0)
        self.mean, self.std = mean.float(), std.float() + 1e-3
        if not normalize:
            self.mean, self.std = torch.zeros_like(self.mean), torch.ones_like(self.std)

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those that start at rows `index` (B,): x (B, H, D), and what has a loss (B, H, D), 0 or 1."""
        wanted, last = index[:, None] + self.offsets, self.last[index][:, None]
        past = (wanted > last).flatten()[:, None]  # (B H, 1)
        rows = self.buffer.take(torch.minimum(wanted, last).flatten())
        states = (torch.where(past, rows.next_obs, rows.obs) - self.mean) / self.std
        x = torch.cat([rows.actions.masked_fill(past, 0.0), states], 1)
        unknown = past & (rows.terminations > 0)[:, None] & (rows.next_obs == rows.obs).all(1, keepdim=True)
        mask = torch.cat([(~past).expand_as(rows.actions), (~unknown).expand_as(states)], 1).to(x)
        return x.view(*wanted.shape, -1), mask.view(*wanted.shape, -1)

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """n of them, uniform with replacement."""
        return self.take(self.buffer.draw(n, self.rows))


def residual(width: int) -> nn.Sequential:
    """What one residual block adds, (B, w) -> (B, w)."""
    wide = 2 * width
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide), nn.Mish(), nn.Linear(wide, width))


class PlannerNet(nn.Module):
    """v(z, u): noised window z (B, H, D), noise level u (B,) or (1,), is its first action known (B,) -> (B, H, D).

    D = A + O, actions first. A residual MLP with one Linear last: U50. Holds the states' mean and std (O,), so that an
    actor made of it takes plain observations.
    """

    def __init__(
        self, horizon: int, act_dim: int, mean: torch.Tensor, std: torch.Tensor, width: int, blocks: int
    ):
        super().__init__()
        self.horizon, self.act_dim, self.row = horizon, act_dim, act_dim + len(mean)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.register_buffer("frequencies", 1_000.0 ** (torch.arange(32) / 31))
        self.inlet = nn.Linear(horizon * self.row + 1, width)
        self.time = nn.Sequential(nn.Linear(64, 128), nn.Mish(), nn.Linear(128, width))
        self.blocks = nn.ModuleList(residual(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, horizon * self.row)

    def normalize(self, obs: torch.Tensor) -> torch.Tensor:
        """States as in windows: (..., O) -> (..., O)."""
        return (obs - self.mean) / self.std

    def features(self, z: torch.Tensor, u: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """What the last layer reads, (B, w)."""
        angles = u[:, None] * self.frequencies
        h = self.inlet(torch.cat([z.flatten(1), given[:, None]], 1))
        h = h + self.time(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            h = h + block(h)
        return self.norm(h)

    def forward(self, z: torch.Tensor, u: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(z, u, given)).view(z.shape)


# Diffusion: z = cos φ x + sin φ ε at φ = π u / 2. Of row 0 the state is known, and now and then the action.


def in_paint(z: torch.Tensor, first: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """z (B, H, D) with `first` (B, D) at row 0 where `known` (B, D) bool: how a plan is conditioned, U53."""
    return torch.cat([torch.where(known, first, z[:, 0])[:, None], z[:, 1:]], 1)


def rotate(z: torch.Tensor, v: torch.Tensor, angle: float) -> torch.Tensor:
    """One DDIM step by `angle`: cos z - sin v; from φ = angle it is the clean estimate.  [Salimans & Ho]"""
    return math.cos(angle) * z - math.sin(angle) * v


def unroll(
    net: PlannerNet, z: torch.Tensor, first: torch.Tensor, known: torch.Tensor, steps: int, left: int = 0
) -> torch.Tensor:
    """The sampler of `steps` equal angles from noise z (B, H, D), but for the last `left`; in-paints around each."""
    given, z = known[:, 0].to(z), in_paint(z, first, known)
    for i in range(steps, left, -1):
        v = net(z, z.new_full((1,), i / steps), given)
        z = in_paint(rotate(z, v, 0.5 * math.pi / steps), first, known)
    return z


def noised(
    x: torch.Tensor, u: torch.Tensor, eps: torch.Tensor, given: torch.Tensor, act_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z = cos φ x + sin φ ε in-painted, v = cos φ ε - sin φ x, and what of row 0 is known (B, D).  [Eq. 3]

    v, not the ε that the paper predicts: D50. x (B, H, D), u (B,), given (B,) bool: the first action is known, too.
    """
    cos, sin = (f(0.5 * math.pi * u)[:, None, None] for f in (torch.cos, torch.sin))
    known = (torch.arange(x.shape[2], device=x.device) >= act_dim) | given[:, None]
    return in_paint(cos * x + sin * eps, x[:, 0], known), cos * eps - sin * x, known


def masked_error(
    got: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Mean of (got - wanted)² over what has a loss (mask, (B, H, D)) and is not in-painted (known, (B, D)) -> ()."""
    mask = torch.cat([(mask[:, 0] * ~known)[:, None], mask[:, 1:]], 1)
    return (mask * (got - wanted).square()).sum() / mask.sum().clamp(min=1)


def planner_loss(net: PlannerNet, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """E (v̂(z, u) - v)² over windows x (B, H, D), u ~ U(0, 1], -> ().  [Eq. 3]: of v, D50; action known or not, U53"""
    u = 1 - torch.rand(len(x), device=x.device)
    given = torch.rand(len(x), device=x.device) < 0.5
    z, v, known = noised(x, u, torch.randn_like(x), given, net.act_dim)
    return masked_error(net(z, u, given.to(x)), v, mask, known)


def distill_target(
    teacher: nn.Module, z: torch.Tensor, u: torch.Tensor, first: torch.Tensor, known: torch.Tensor, steps: int
) -> torch.Tensor:
    """The v that takes z at u in one step where the teacher gets in two of half the angle.  [Salimans & Ho]

    v* = (cos 2δ z - z₂) / sin 2δ, δ = π / (4 steps); at steps = 1 it is -z₂. z (B, H, D), u (B,) -> (B, H, D).
    """
    given, delta = known[:, 0].to(z), 0.25 * math.pi / steps
    z1 = in_paint(rotate(z, teacher(z, u, given), delta), first, known)
    z2 = in_paint(rotate(z1, teacher(z1, u - 0.5 / steps, given), delta), first, known)
    return (math.cos(2 * delta) * z - z2) / math.sin(2 * delta)


def distill_loss(
    net: PlannerNet, teacher: PlannerNet, x: torch.Tensor, mask: torch.Tensor, steps: int, shrink: bool
) -> torch.Tensor:
    """E (v̂(z, u) - v*)² over windows x (B, H, D), u uniform in {1/steps, ..., 1} -> ().  [§3.1; Salimans & Ho]

    shrink: some of the pure noise is nearer to 0, where the actor's plans start: U52.
    """
    i = torch.randint(1, steps + 1, (len(x),), device=x.device)
    given = torch.rand(len(x), device=x.device) < 0.5
    eps, u = torch.randn_like(x), i / steps
    if shrink:
        some = (i == steps) & (torch.rand(len(x), device=x.device) < SHRUNK)
        eps = eps * torch.where(some, torch.rand(len(x), device=x.device), 1.0)[:, None, None]
    z, _, known = noised(x, u, eps, given, net.act_dim)
    with torch.no_grad():
        target = distill_target(teacher, z, u, x[:, 0], known, steps)
    return masked_error(net(z, u, given.to(x)), target, mask, known)


# --- end shared: dual.planner ---


# returns, and the windows of what has been lived through
def returns_to_go(rewards: np.ndarray, terminations: np.ndarray, ends: np.ndarray, args: Args) -> np.ndarray:
    """R_t = r_t + γ R_{t+1} from each row to its episode's end, all (N,); nothing follows the end.  [§3.2, code]

    An episode's last reward has something added to it, as it terminates or not; the very last row ends one: U120.
    """
    ends, returns, following = ends.copy(), np.zeros(len(rewards)), 0.0
    ends[-1:] = True
    last = np.where(terminations > 0, args.terminal_reward, args.cutoff_reward)
    rewards = rewards.astype(np.float64) + np.where(ends, last, 0.0)
    for t in reversed(range(len(rewards))):
        following = returns[t] = rewards[t] + (0.0 if ends[t] else args.gamma * following)
    return returns.astype(np.float32)


class Episodes:
    """Windows and returns-to-go of the finished episodes in a buffer: the dataset's, then also own ones.  U121"""

    def __init__(self, buffer: ReplayBuffer, ends: np.ndarray, args: Args):
        """`buffer` holds the dataset, whose episodes end at `ends` (N,) bool, and has room for own rows."""
        self.buffer, self.args, self.rows = buffer, args, 0  # rows: of finished episodes
        self.windows = Windows(buffer, ends, args.horizon, args.normalize_windows)
        self.windows.last = F.pad(self.windows.last, (0, len(buffer.table) - len(ends)))
        self.returns = torch.zeros(len(buffer.table), device=buffer.table.device)
        self.label(ends)

    def label(self, ends: np.ndarray) -> None:
        """The next rows of the buffer, as many as `ends` (n,) bool, are whole episodes: returns, and they count."""
        part = slice(self.rows, self.rows + len(ends))
        rows = self.buffer.take(torch.arange(part.start, part.stop, device=self.returns.device))
        found = rows.rewards.cpu().numpy(), rows.terminations.cpu().numpy()
        returns = returns_to_go(*found, ends, self.args)
        self.returns[part] = torch.from_numpy(returns).to(self.returns)
        self._resize(part.stop)

    def finish(self, length: int) -> None:
        """The last `length` rows are an episode that is over.

        What lies before it and has no end was interrupted, and could not be gone on with: an episode that was cut off.
        """
        stop = len(self.buffer)
        for end in (stop - length, stop):
            if end > self.rows:
                self.windows.last[self.rows : end] = end - 1
                self.label(np.arange(self.rows, end) == end - 1)

    def _resize(self, rows: int) -> None:
        self.rows = rows
        self.windows.rows.fill_(rows)

    def state_dict(self) -> dict:
        """Of the own rows."""
        own = slice(self.buffer.fixed, self.rows)
        return {"last": self.windows.last[own].clone(), "returns": self.returns[own].clone()}

    def load_state_dict(self, state: dict) -> None:
        own = slice(self.buffer.fixed, self.buffer.fixed + len(state["last"]))
        self.windows.last[own], self.returns[own] = state["last"], state["returns"]
        self._resize(own.stop)

    def weighted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of windows (B, H, D), and the weights (B, H, D) of their errors, of the first action more.  [code]"""
        x, mask = self.windows.draw(self.args.planner_batch)
        actions = self.buffer.widths[1]
        first = self.args.action_weight * mask[:, :1, :actions]
        return x, torch.cat([torch.cat([first, mask[:, :1, actions:]], 2), mask[:, 1:]], 1)

    def labelled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of windows (B, H, D) and their returns (B,)."""
        index = self.buffer.draw(self.args.planner_batch, self.windows.rows)
        return self.windows.take(index)[0], self.returns[index]


class ReturnGuide(nn.Module):
    """J(z, u): noised windows (B, H, D), levels (B,) or (1,) -> returns (B,); the planner's network, one number last.

    mean and std () of the labels: the network has them in units of their std: U124.
    """

    def __init__(self, trunk: PlannerNet, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.trunk = trunk
        self.trunk.head = nn.Linear(trunk.head.in_features, 1)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        features = self.trunk.features(z, u, torch.zeros_like(z[:, 0, 0]))
        return self.mean + self.std * self.trunk.head(features).squeeze(1)


def guide_loss(
    guide: ReturnGuide, x: torch.Tensor, returns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """E (J(z, u) - R)² in units of the labels' variance, u ~ U(0, 1], -> (), and the mean of J - R in their std.

    x (B, H, D), returns (B,); z has its first state in-painted, as it will be when J guides.  [code]
    """
    u, given = 1 - torch.rand(len(x), device=x.device), torch.zeros_like(returns, dtype=torch.bool)
    z, _, _ = noised(x, u, torch.randn_like(x), given, guide.trunk.act_dim)
    error = (guide(z, u) - returns) / guide.std
    return error.square().mean(), error.detach().mean()


# drawing plans
def posterior(phi: float, before: float) -> tuple[float, float, float]:
    """q(z' | z, x) from angle phi to `before`: shares of x and z in its mean, its variance Σ.  [DDPM Eq. 7]"""
    alpha = (math.cos(phi) / math.cos(before)) ** 2
    shares = math.cos(before) * (1 - alpha), math.sqrt(alpha) * math.sin(before) ** 2
    return *(s / math.sin(phi) ** 2 for s in shares), (1 - alpha) * (math.sin(before) / math.sin(phi)) ** 2


def value_gradient(guide: nn.Module, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """∇J at z (B, H, D), u (1,), row by row -> (B, H, D)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(guide(z, u).sum(), z)[0]


@torch.no_grad()
def guided_plans(
    planner: nn.Module, guide: nn.Module, first: torch.Tensor, known: torch.Tensor, horizon: int, args: Args
) -> torch.Tensor:
    """Plans (B, H, D) whose row 0 has `first` (B, D) where `known` (B, D) bool.  [Alg. 1, as in the code]

    Each of T steps draws from N(μ, Σ) around the plan moved by ω Σ ∇J, some times over, the last ones unguided; noise
    is scaled: D124.
    """

    def noise() -> torch.Tensor:
        shape = first.shape[0], horizon, first.shape[1]
        return args.temperature * torch.randn(shape, device=first.device)

    given, z = known[:, 0].to(first), in_paint(noise(), first, known)
    angle = 0.5 * math.pi / args.denoise_steps
    for i in range(args.denoise_steps, 0, -1):
        u = z.new_full((1,), i / args.denoise_steps)
        of_clean, of_z, variance = posterior(i * angle, (i - 1) * angle)
        for _ in range(args.guide_repeats if i > args.guide_stop else 0):
            move = args.guide_scale * variance * value_gradient(guide, z, u)
            z = in_paint(z + move, first, known)
        clean = rotate(z, planner(z, u, given), i * angle)
        z = of_clean * clean + of_z * z
        if i > 1:
            z = z + math.sqrt(variance) * noise()
        z = in_paint(z, first, known)
    return z


def starts(planner: PlannerNet, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row 0 of plans from obs (B, O), (B, D), and which of it is known (B, D): the state.  [§3.3]"""
    first = torch.cat([obs.new_zeros(obs.shape[0], planner.act_dim), planner.normalize(obs)], 1)
    known = torch.arange(planner.row, device=obs.device) >= planner.act_dim
    return first, known.expand_as(first)


@torch.no_grad()
def pick_actions(
    planner: PlannerNet, guide: ReturnGuide, obs: torch.Tensor, args: Args, one_step: bool = False
) -> torch.Tensor:
    """First actions of the best of `plans` plans: obs (E, O) -> (E, A) in [-1, 1].  [§3.2, code]: best at u = 0, U124

    one_step: `planner` is a student, whose plans are not guided: U125.
    """
    first, known = starts(planner, obs.repeat_interleave(args.plans, 0))
    if one_step:
        shape = first.shape[0], planner.horizon, planner.row
        z = torch.randn(shape, device=obs.device)
        plans = unroll(planner, z, first, known, 1)
    else:
        plans = guided_plans(planner, guide, first, known, planner.horizon, args)
    values = guide(plans, obs.new_zeros(1)).view(-1, args.plans)
    best = values.argmax(1) + args.plans * torch.arange(obs.shape[0], device=obs.device)
    return plans[best, 0, : planner.act_dim].clamp(-1, 1)


# training
def make_diffuser_nets(episodes: Episodes, act_dim: int, args: Args) -> nn.ModuleDict:
    """planner, guide, average (of both); how many updates each has had are buffers beside them."""
    windows, nets = episodes.windows, nn.ModuleDict()
    sizes = args.horizon, act_dim, windows.mean, windows.std, args.planner_width, args.planner_blocks
    nets["planner"] = PlannerNet(*sizes)
    labels = episodes.returns[: episodes.rows].double()
    std, mean = torch.std_mean(labels, correction=0)
    nets["guide"] = ReturnGuide(PlannerNet(*sizes), mean.float(), std.float() + 1e-3)
    nets["average"] = deepcopy(nets).requires_grad_(False)
    for name in ("planner", "guide"):
        nets.register_buffer(f"{name}_updates", torch.zeros(()))
    return nets


def make_plan_optimizer(net: nn.Module, lr: float, device: torch.device) -> torch.optim.Adam:
    """Adam over what is trained of `net`, its learning rate a tensor."""
    weights = [p for p in net.parameters() if p.requires_grad]
    rate = torch.tensor(lr, device=device)
    return torch.optim.Adam(weights, lr=rate, fused=True, capturable=device.type == "cuda")


def update(opt: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One gradient step of what the loss depends on; nothing in here waits for the GPU."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()


@torch.no_grad()
def move_average(average: nn.Module, net: nn.Module, updates: torch.Tensor) -> None:
    """After a step of `net`, counted in `updates` (): its running average, a copy until EMA_START.  [code]: U52"""
    updates.add_(1)
    moves = (updates - EMA_START).clamp(min=0) / EMA_EVERY
    share = (1 / (1 + moves)).clamp(min=1 - EMA_DECAY)  # a plain mean at first, for short trainings
    moving = (updates <= EMA_START) | (updates.remainder(EMA_EVERY) == 0)
    share = torch.where(moving, share, 0.0)
    for mine, live in zip(average.parameters(), net.parameters(), strict=True):
        mine.lerp_(live, share)


# D-Diffuser
def follow_loss(
    student: PlannerNet, planner: PlannerNet, x: torch.Tensor, mask: torch.Tensor, steps: int
) -> torch.Tensor:
    """E (v̂ - v*)² at pure noise, v* = -(the planner's plan in `steps` steps from it) -> ().  [Salimans & Ho]: U125

    Of the windows x (B, H, D), whose errors have weights `mask`, only the first state counts.
    """
    ones, given = x.new_ones(len(x)), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    z, _, known = noised(x, ones, torch.randn_like(x), given, student.act_dim)
    with torch.no_grad():
        target = -unroll(planner, z, x[:, 0], known, steps)
    return masked_error(student(z, ones, given.to(x)), target, mask, known)


class PlanDistiller:
    """Halves the average planner's deterministic chain to one step, in a phase before the online one: U125."""

    def __init__(self, r: run.Run, args: Args, nets: nn.ModuleDict, draw: Callable):
        self.r, self.args, self.source, self.draw = r, args, nets["average"]["planner"], draw
        self.student = deepcopy(self.source).requires_grad_(True)
        self.teacher = deepcopy(self.source)
        self.opt = make_plan_optimizer(self.student, args.distill_lr, r.device)
        self.count = torch.zeros((), device=r.device)  # gradient steps of the running halving
        self.loss, self.follow_loss = r.compiled(distill_loss), r.compiled(follow_loss)

    def state(self) -> dict:
        """What a checkpoint holds, by name."""
        return {f"distill_{k}": getattr(self, k) for k in ("student", "teacher", "opt", "count")}

    def halving_step(self, steps: int, updates: int) -> dict[str, torch.Tensor]:
        """One of the `updates` gradient steps of the student of `steps` denoising steps."""
        self.opt.param_groups[0]["lr"].copy_(self.args.distill_lr * (1 - self.count / updates))
        loss = self.loss(self.student, self.teacher, *self.draw(), steps, False)
        update(self.opt, loss)
        self.count.add_(1)
        return {"loss/distill": loss.detach()}

    def follow_step(self) -> dict[str, torch.Tensor]:
        """Online: one gradient step towards the average planner's own plans, at the planner's learning rate."""
        loss = self.follow_loss(self.student, self.source, *self.draw(), self.args.distill_from)
        update(self.opt, loss)
        return {"loss/follow": loss.detach()}

    def restart(self, source: nn.Module) -> None:
        """`source` is the next teacher, and where its student starts; the optimizer is fresh."""
        self.teacher.load_state_dict(source.state_dict())
        self.student.load_state_dict(source.state_dict())
        self.count.zero_()
        for state in self.opt.state.values():
            for x in state.values():
                x.zero_()

    @torch.no_grad()
    def error(self, steps: int) -> float:
        """Mean square between first actions of the student's plans and the planner's, from the same noise."""
        x, _ = self.draw()
        given = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        z, _, known = noised(x, x.new_ones(len(x)), torch.randn_like(x), given, self.student.act_dim)
        mine = unroll(self.student, z, x[:, 0], known, steps)
        theirs = unroll(self.source, z, x[:, 0], known, self.args.distill_from)
        return (mine - theirs)[:, 0, : self.student.act_dim].square().mean().item()

    def learn(self) -> None:
        """All halvings, as one phase."""
        steps, until = self.args.distill_from, 0
        while steps > 1:
            steps //= 2
            updates = self.args.halving_steps * (2 if steps <= 2 else 1)
            start, until = until, until + updates
            step_fn = self.r.capture(partial(self.halving_step, steps, updates))
            for step in self.r.phase("distill", until):
                if step == start:
                    self.restart(self.source if start == 0 else self.student)
                self.r.log(step, step_fn())
            if self.r.once(f"halving to {steps}"):
                self.r.record(until, {"distill/error": self.error(steps)})
        if self.r.once("distilled"):
            self.restart(self.student)
            self.opt.param_groups[0]["lr"].fill_(self.args.lr)


def train(args: Args) -> dict[str, float]:
    task = data.get_task(args.env)
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    if args.distill and args.distill_from & (args.distill_from - 1):
        raise run.UsageError("--distill-from", args.distill_from, "a power of two")
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    units = data.Units(reward_bias=args.reward_bias)
    buffer = dataset.buffer(units, r.device, args.online_steps)  # own rows come behind: U121
    interaction = data.Interaction(data.make_env(task, units), buffer, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)
    episodes = Episodes(buffer, dataset.ends, args)

    # networks
    nets = make_diffuser_nets(episodes, task.act_dim, args).to(r.device)
    opt = make_plan_optimizer(nets, args.lr, r.device)
    distiller = PlanDistiller(r, args, nets, episodes.weighted) if args.distill else None

    def act(obs: torch.Tensor) -> torch.Tensor:  # stochastic, online and in evaluation: U122
        one_step, average = "distilled" in r.passed, nets["average"]
        planner = distiller.student if one_step else average["planner"]
        return pick_actions(planner, average["guide"], obs, args, one_step)

    added = distiller.state() if distiller else {}
    r.register(nets=nets, opt=opt, online=buffer, episodes=episodes, interaction=interaction, **added)
    compiled_planner_loss, compiled_guide_loss = r.compiled(planner_loss), r.compiled(guide_loss)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    def guide_step() -> dict[str, torch.Tensor]:
        loss, bias = compiled_guide_loss(nets["guide"], *episodes.labelled())
        update(opt, loss)
        move_average(nets["average"]["guide"], nets["guide"], nets.guide_updates)
        return {"loss/guide": loss.detach(), "guide/bias": bias}

    def offline_step() -> dict[str, torch.Tensor]:
        loss = compiled_planner_loss(nets["planner"], *episodes.weighted())  # of v, at any level: D120
        update(opt, loss)
        move_average(nets["average"]["planner"], nets["planner"], nets.planner_updates)
        return {"loss/planner": loss.detach()}

    # offline: the guide, then the planner
    if args.from_offline and r.once("from_offline"):
        r.import_phase("offline", args.from_offline, offline_settings, nets=nets, opt=opt)
    if not args.from_offline:
        step_fn = r.capture(guide_step)
        for step in r.phase("guide", args.guide_steps):
            r.log(step, step_fn())
    step_fn = r.capture(offline_step)
    for step in r.phase("offline", args.offline_steps):
        r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 and step + 1 < args.offline_steps:
            r.record(step + 1, evaluate(act, r.device))
    if r.once("offline_end"):
        r.record(args.offline_steps, evaluate(act, r.device))
        r.export_phase("offline", offline_settings, nets=nets, opt=opt)  # all goes on: U121
        evaluate.export(act, r)

    # one step instead of many, which then acts
    if distiller:
        distiller.learn()
        if r.once("distill_end"):
            r.record(r.done["distill"], evaluate(act, r.device))

    # online: one environment step, then utd gradient steps of planner and guide each
    def online_step() -> dict[str, torch.Tensor]:
        logs = offline_step() | guide_step()
        return logs | distiller.follow_step() if distiller else logs

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(act):
            r.record(step + 1, episode)
            episodes.finish(episode["train/episode_length"])
        if step >= args.warmup_steps:
            for _ in range(args.utd):
                logs = step_fn()
            r.log(step, logs)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act, r.device))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
