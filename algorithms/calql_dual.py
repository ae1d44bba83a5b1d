"""DUAL on Cal-QL: a distilled diffusion planner as actor, its last layer Bayesian, and both kinds of doubt explore.

Paper    Bui, Jazbec, Nalisnick, Liu, "Efficient and Uncertainty-Aware Diffusion Framework for Offline-to-Online
         Reinforcement Learning", arXiv 2605.30776v1: Eq., Alg., Table below; no code is public. Distillation: Salimans,
         Ho, ICLR 2022, arXiv 2202.00512. Diffuser: Janner et al., ICML 2022, arXiv 2205.09991. Backbone: calql.py.
Idea     Offline: a diffusion model of windows learns behavior and dynamics at once, 32 denoising steps are distilled
         into one, and the first action of that one-step plan becomes the mean of a Gaussian actor, which maximises Q
         and entropy, and whose actions are also those that Cal-QL pushes down. That mean is affine in the last layer,
         so a weighted likelihood has an exact Gaussian posterior. Online: K draws of the layer widen the policy where
         data are few; so does the error of the frozen student's next state, where the world is not the dataset's.
Symbols  τ window of H = horizon steps, each [a, s] | u noise level, angle φ = π u / 2 | z noised window | v what the
         net predicts | T denoising steps | μ, σ actor | W last layer, f its features | G precision of a row of W, M its
         part from data | K laplace_draws | λ shift_weight | d prediction error | P̂ transition | Q, α, α_cql, α', R as
         in calql.py, whose G is here `bound`
Read     NEW: planner, distillation; PlanActor; Planner; posterior, Explorer: all dual.py's; then the box, and the rows'
         weights. Of calql.py: DeepTwinQ; conservative_gap (R), frozen_q, draw_noise; Returns (`bound`); optimizer,
         update; dual_losses are its `losses` with this actor. Then train.
Notes    D1, D2, D3, D4, D6, D7, U1, U2, U3 as in calql.py. Of the code shared with dual.py, which says more:
         D50 Eq. 3 predicts noise; here v on the cosine schedule: at pure noise ε is the input itself.
         D51 Eq. 6 is a spike and dies with σ; here unit noise, prior laplace_prior, N_eff from laplace_std.
         D52 ŝ' off the plan; here P̂ is asked again, with the executed action.
         D53 no caps; here epistemic variance at most 0.25, λ d at most 1, per dimension of the action.
         D56 all of W is drawn; here not along the one direction that normed features and 1 never take.
         D57 P̂ is the student; here then trained on d: its own error would hide a shift.
         D59 1M online steps, as the paper and CORL; calql.py's are 200,000. The warm-up (D4) is not CORL's.
         U50 planner network: residual MLP on the flattened window, one Linear last.
         U51 H is 4, in AntMaze 32; stride 1, windows from every row; past an episode's end, actions have no loss.
         U52 32 -> 1 denoising steps; rates, gradient norm, average, halvings; shrunk noise.
         U53 what is known stands in the noised input. U54 latent of μ: zero; evaluation: μ of W itself, no noise.
         U55 σ: a parameter per action. U56 draws: how many, when fitted, kept as offsets. U57 norm of d; P̂ is frozen.
         U61 no diffusion loss during RL; --bc-coef adds Eq. 3 on dataset windows to the actor's. Of this file:
         D58 the text's Gaussian has no bounds; clipped, μ leaves the box (up to 14): Q's gradient goes on outside, and
            the entropy sees nothing. Here a = box(u), u ~ N(μ, σ²): the identity up to 0.9, beyond it a tanh, with its
            Jacobian in log π, as calql.py's; μ starts as planned, and the posterior does not mind.
         U63 actor's loss: SAC's, as Cal-QL's; the draws of W, σ, the epistemic part and the shift act on u.
         U64 Eq. 6 wants a weighted likelihood, which this loss is not, and of Q, which may be negative: rows weigh
            exp((Q - V) / std), the exponent within ±5, V the mean Q of 4 actions of π, std over the rows of the fit.
         U65 a' in TD targets and in the regulariser have σ only: the epistemic part and the shift are for acting.
Metrics  calql.py's, but policy/data_log_prob; dual.py's; policy/outside: mean of relu(|μ| - 1).
Run      python algorithms/calql_dual.py --env hopper-medium-v2 --seed 0; another run's phase: --from-offline, or
         --from-planner (also dual.py's, if the planner settings agree). Ablations as in dual.py: --horizon 1
         --shift-weight 0 | --distill-steps 32 | --uq none | --uq latent | --laplace-weights elbo | --time-acting
Cost     reacher-mini-v0: 2.1 CPU minutes; published sizes want a GPU (not measured there).
Fails    on reacher-mini-v0 to end where Cal-QL does, 4.9 [1.8, 8.0] below; without the epistemic noise, or the shift
         term, it ends there, too (five pairs; README). Seeds 100 and 101 end 2.0 above it and 0.3 below. The network of
         μ can be why: calql.py with the preset's (U50, one block) for its actor's layers ends 5.2 [2.4, 7.9] below
         itself on seeds 0, 4, 5, 8 (three of them those of the largest losses), without the last norm 3.9 [2.0, 5.8],
         with three blocks 1.2 [-3.2, 5.6]. Not why: one σ per action, --policy-lr 1e-4 or 1e-3.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, judge, run
from common.buffer import Batch, ReplayBuffer, mix
from common.run import Count, Natural, Number, Portion, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [CORL]
    online_steps: Natural = 1_000_000  # environment steps [CORL]; calql.py's are fewer: D59
    from_offline: Path | None = None  # run directory (or its offline.pt) to take the offline phase from
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it works
    compile: bool | None = None  # compile and capture the gradient step; default: on for cuda, off for cpu
    out_dir: Path = Path("runs")  # the run lives in <out-dir>/<file>/<env>/seed<seed>
    overwrite: bool = False  # start anew instead of resuming
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to the run directory, for TensorBoard
    eval_every: Count = 5_000  # steps of the running phase [CORL]
    eval_episodes: Count = 10  # episodes of an evaluation [CORL]
    # Cal-QL
    batch_size: Several = 256  # transitions [DARE Table 4]
    gamma: Share = 0.99  # discount [DARE Table 4]
    polyak: Rate = 0.005  # share of qf copied into q_target at every gradient step [DARE Table 4]
    policy_lr: Positive = 1e-4  # Adam, actor and entropy weight [DARE Table 4]
    critic_lr: Positive = 3e-4  # Adam, critics and Lagrange multiplier [DARE Table 4]
    hidden: Count = 256  # width of the hidden layers [DARE Table 4]; the actor's is planner_width
    critic_layers: Count = 3  # hidden layers of each critic [DARE Table 4]
    cql_weight: Weight = 10.0  # α_cql offline [DARE Table 4]
    cql_weight_online: Weight = 10.0  # α_cql online [DARE Table 4]
    cql_n_actions: Count = 10  # of each of three kinds: uniform, π(s), π(s') [CORL]
    cql_clip_min: Annotated[float, "[-inf, 0]"] = -200.0  # least gap per row [DARE Table 4]
    calibrate: bool = True  # off: CQL
    calibrate_online: bool = False  # D3
    lagrange: bool = False  # α' learned so that the gap meets target_gap [DARE Table 4]
    target_gap: Number = -1.0  # of the Lagrange variant; -1 where there is none [DARE Table 4]
    max_target_backup: bool = False  # TD target from the best of cql_n_actions next actions [DARE Table 4]
    normalize_obs: bool = True  # (obs - mean) / (std + 1e-3) of the dataset [DARE Table 4]
    reward_scale: Positive = 1.0  # rewards in training: scale · r + bias [DARE Table 4]
    reward_bias: Number = 0.0  # added to rewards in training, after scaling [DARE Table 4]
    sparse_reward: bool = False  # an episode that never succeeds fails for ever [DARE Table 4]
    # online
    warmup_steps: Natural = 5_000  # environment steps without updates, counted in online_steps: D4
    utd: Count = 1  # gradient steps per environment step
    offline_frac: Portion = 0.5  # share of a batch from the dataset [CORL]
    # NEW: planner
    from_planner: Path | None = None  # run directory (or its planner.pt) to take the planner from
    horizon: Count = 4  # H, steps of a window; 1 = no planner; the paper's is unknown: U51
    normalize_windows: bool = True  # states of windows in units of their std: U51
    planner_steps: Natural = 500_000  # gradient steps; as all of the training, ours: U52
    planner_batch: Count = 256  # windows: U52
    planner_lr: Positive = 3e-4  # Adam, cosine to 0; in each halving linear to 0: U52
    planner_width: Count = 512  # of the residual blocks; the paper names no network: U50
    planner_blocks: Natural = 3  # residual blocks: U50
    teacher_steps: Count = 32  # denoising steps of the planner; 32 to 1 from Table 4: U52
    # NEW: actor
    distill_steps: Count = 1  # T, denoising steps of the actor; teacher_steps = no distillation: U52
    halving_steps: Count = 20_000  # gradient steps per halving, twice as many to 2 and 1 denoising steps: U52
    eval_halvings: bool = False  # evaluate the clone of each halving's student
    latent: Literal["zero", "sample"] = "zero"  # where the actor's plan starts, at which noise: U54
    bc_coef: Weight = 0.0  # weight of the planner's loss in the actor's; the text has none: U61
    # NEW: uncertainty
    uq: Literal["laplace", "latent", "none"] = "laplace"  # what the K sub-policies differ in [Fig. 3c]
    laplace_weights: Literal["actor", "elbo"] = "actor"  # likelihood of the posterior [Remark 3.3]
    laplace_noise: Literal["unit", "sigma"] = "unit"  # std of the actions given W; sigma: Eq. 6: D51
    laplace_draws: Count = 10  # K, sub-policies; how many, and when they are drawn anew, is ours: U56
    laplace_every: Count = 5_000  # environment steps between fits: U56
    laplace_rows: Count = 50_000  # transitions of a fit, at most: U56
    laplace_std: Weight = 0.1  # epistemic std on data that sets N_eff; 0 = N_eff is the sum of weights: D51
    laplace_prior: Positive = 1.0  # τ0, prior precision of the last layer; the text's is flat: D51
    shift_weight: Weight = 0.5  # λ [Table 5]
    fit_transition: bool = True  # train P̂ on d after the distillation; off: the text: D57
    time_acting: bool = False  # only print milliseconds per action for 1, 2, 4, ... denoising steps [Table 4]


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(  # [DARE Table 4; episodes: CORL; horizon: U51]
        critic_layers=5, cql_weight=5.0, cql_weight_online=5.0, lagrange=True, max_target_backup=True,
        normalize_obs=False, reward_scale=10.0, reward_bias=-5.0, sparse_reward=True, target_gap=0.8,
        eval_every=10_000, eval_episodes=100, horizon=32,
    ),
    **{k: dict(cql_weight=1.0, cql_weight_online=1.0, max_target_backup=True, normalize_obs=False)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [CORL, fine-tuning]
    "maze2d-": dict(policy_lr=3e-5, lagrange=True, target_gap=5.0, eval_episodes=100),  # [CORL, offline CQL]
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, cql_weight=5.0, cql_weight_online=5.0,
        planner_steps=3_000, planner_width=64, planner_blocks=1, planner_lr=1e-3, halving_steps=300,
        laplace_every=1_000, laplace_rows=10_000,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50, cql_weight_online=1.0),
}  # fmt: skip
# --- shared: dual.settings ---
PLANNER_SETTINGS = (  # NEW: what a planner depends on, beside the dataset
    "horizon", "planner_steps", "planner_batch", "planner_lr", "planner_width", "planner_blocks",
    "normalize_windows", "normalize_obs",
)  # fmt: skip
# --- end shared: dual.settings ---
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "policy_lr", "critic_lr", "hidden", "critic_layers",
    "cql_weight", "cql_n_actions", "cql_clip_min", "calibrate", "lagrange", "target_gap", "max_target_backup",
    "normalize_obs", "reward_scale", "reward_bias", "sparse_reward",
    *PLANNER_SETTINGS[:-1], "teacher_steps", "distill_steps", "halving_steps", "latent", "bc_coef", "fit_transition",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "lagrange": ("target_gap",),
    "calibrate": ("sparse_reward",),
    "uq == 'laplace'": (
        "laplace_weights", "laplace_noise", "laplace_every", "laplace_rows", "laplace_std", "laplace_prior",
    ),
    "uq != 'none'": ("laplace_draws",),
    "teacher_steps > distill_steps": ("halving_steps", "eval_halvings"),
}  # fmt: skip


# NEW: from here to calql.py's blocks, DUAL. First the planner, a diffusion over windows of actions and states.
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


# NEW: the actor, and the transition model, that a student makes
# --- shared: dual.actor ---
LOG_STD_MIN, LOG_STD_MAX, LOG_STD_START = -5.0, 0.5, -1.0  # of the actor's σ: U55


class PlanActor(nn.Module):
    """π(a|s) = N(μ(s), diag σ²), μ the T-step plan's first action: obs (B, O) -> μ (B, A), log σ (A,).  [Eq. 4]: U55

    The last of the T steps is affine in the net's last layer: with f1 = -sin δ [f, 1], δ = π / 2T, and W the layer with
    its biases, plan = base + f1 Wᵀ. Frozen, it also is the transition model: its plan with the first action given.
    """

    def __init__(self, net: PlannerNet, steps: int, latent: str):
        super().__init__()
        self.net, self.steps, self.latent = net, steps, latent
        self.log_std = nn.Parameter(torch.full((net.act_dim,), LOG_STD_START))

    def noise(self, rows: int) -> torch.Tensor:
        """Latents (rows, H, D) ~ N(0, I)."""
        return torch.randn(rows, self.net.horizon, self.net.row, device=self.log_std.device)

    def start(self, obs: torch.Tensor, actions: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Zero latent (B, H, D), row 0 (B, D), and which of it is known (B, D): the action only if there is one."""
        net, act = self.net, obs.new_zeros(obs.shape[0], self.net.act_dim) if actions is None else actions
        first = torch.cat([act, net.normalize(obs)], 1)
        known = torch.arange(net.row, device=obs.device) >= (net.act_dim if actions is None else 0)
        known = known.expand_as(first)
        return first.new_zeros(obs.shape[0], net.horizon, net.row), first, known

    def features(self, obs: torch.Tensor, z: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """f1 (B, w + 1), base (B, H D): plan = base + f1 Wᵀ; from the latent z (B, H, D), zero if None: U54."""
        zero, first, known = self.start(obs)
        z = unroll(self.net, zero if z is None else z, first, known, self.steps, left=1)
        f = self.net.features(z, z.new_full((1,), 1 / self.steps), known[:, 0].to(z))
        delta = 0.5 * math.pi / self.steps
        f1 = -math.sin(delta) * torch.cat([f, torch.ones_like(f[:, :1])], 1)
        return f1, math.cos(delta) * z.flatten(1)

    def read(self, f1: torch.Tensor, base: torch.Tensor, part: slice) -> torch.Tensor:
        """Entries `part` of the plan: base + f1 Wᵀ."""
        head = self.net.head
        weight = torch.cat([head.weight[part], head.bias[part, None]], 1)
        return base[:, part] + f1 @ weight.T

    @property
    def first_action(self) -> slice:
        return slice(self.net.act_dim)

    @torch.no_grad()
    def null(self) -> torch.Tensor:
        """The direction (w + 1,) that every [f, 1] is normal to: a layer norm's outputs add up to 0.  D56"""
        gain, bias = self.net.norm.weight.double(), self.net.norm.bias.double()
        return F.normalize(torch.cat([1 / gain, -(bias / gain).sum()[None]]), dim=0)

    def std(self) -> torch.Tensor:
        return self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # a latent is drawn where gradients are, in the losses; under no_grad, as in evaluation, it is zero: U54
        z = self.noise(len(obs)) if self.latent == "sample" and torch.is_grad_enabled() else None
        mean = self.read(*self.features(obs, z), self.first_action)
        return mean, self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def predict(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """ŝ' = P̂(s, a) in normalised units: obs (B, O), actions (B, A), the executed ones (D52) -> (B, O).  [§3.3]"""
        return unroll(self.net, *self.start(obs, actions), self.steps)[:, 1, self.net.act_dim :]

    def prediction_error(self, batch: Batch) -> torch.Tensor:
        """d: mean over dimensions of (s' - ŝ')² in normalised units, (B,).  [Eq. 8]: which norm, U57"""
        predicted = self.predict(batch.obs, batch.actions)
        return (self.net.normalize(batch.next_obs) - predicted).square().mean(1)


def transition_loss(model: PlanActor, batch: Batch) -> torch.Tensor:
    """Mean of d, 0 for rows that end an episode: after those no d is ever used.  [Eq. 8]: training on d is D57"""
    return ((1 - batch.terminations) * model.prediction_error(batch)).mean()


# --- end shared: dual.actor ---


# NEW: the phases that train planner, students and transition model
# --- shared: dual.phases ---
def halvings(args: Args) -> list[tuple[int, int]]:
    """(denoising steps of the student, gradient steps) of each halving, teacher_steps -> distill_steps.  U52

    Refuses ladders that miss distill_steps, and a shift term where windows have no next state.
    """
    if args.horizon < 2 and args.shift_weight > 0:
        allowed = "2 or more, or --shift-weight 0: one step has no next state"
        raise run.UsageError("--horizon", args.horizon, allowed)
    ladder, steps = [], args.teacher_steps
    while steps > args.distill_steps and steps % 2 == 0:
        steps //= 2
        ladder.append((steps, args.halving_steps * (2 if steps <= 2 else 1)))
    if steps != args.distill_steps:
        allowed = f"{args.teacher_steps}, or that halved some times"
        raise run.UsageError("--distill-steps", args.distill_steps, allowed)
    return ladder


class Planner:
    """Trains the planner, then its students, then P̂, which are all `net`: in three phases before RL.  [Alg. 1, l. 3-5]

    average: running average of the planner, the first teacher; teacher: what the running halving distills, in the end
    the last student, which becomes the actor.
    """

    def __init__(self, r: run.Run, args: Args, windows: Windows, act_dim: int, dataset_hash: str):
        self.r, self.args, self.windows, self.act_dim = r, args, windows, act_dim
        self.ladder = halvings(args)
        r.seed("planner networks")  # the same planner beside any backbone
        sizes = args.planner_width, args.planner_blocks
        self.net = PlannerNet(args.horizon, act_dim, windows.mean, windows.std, *sizes).to(r.device)
        self.average, self.teacher = (deepcopy(self.net).requires_grad_(False) for _ in range(2))
        lr = torch.tensor(args.planner_lr, device=r.device)
        adam = dict(fused=True, capturable=r.device.type == "cuda")
        self.opt = torch.optim.Adam(self.net.parameters(), lr=lr, **adam)
        self.count = torch.zeros((), device=r.device)  # gradient steps since the (re)start
        self.model = PlanActor(self.net, args.distill_steps, "zero").to(r.device)  # what becomes P̂
        self.planner_loss, self.distill_loss = r.compiled(planner_loss), r.compiled(distill_loss)
        self.transition_loss = r.compiled(transition_loss)
        self.settings = {k: getattr(args, k) for k in PLANNER_SETTINGS} | {"dataset": dataset_hash}

    def state(self) -> dict:
        """What a checkpoint holds, by name."""
        return {f"planner_{k}": getattr(self, k) for k in ("net", "average", "teacher", "opt", "count")}

    def descend(self, loss: torch.Tensor, share_of_lr: torch.Tensor) -> None:
        """One gradient step of the live net at that share of the learning rate, counted."""
        self.opt.param_groups[0]["lr"].copy_(self.args.planner_lr * share_of_lr)
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)  # the norm, as all rates: U52
        self.opt.step()
        self.count.add_(1)

    def planner_step(self) -> dict[str, torch.Tensor]:
        """One gradient step of the planner and its average, a copy of it until EMA_START."""
        loss = self.planner_loss(self.net, *self.windows.draw(self.args.planner_batch))
        self.descend(loss, 0.5 * (1 + torch.cos(self.count * (math.pi / self.args.planner_steps))))
        with torch.no_grad():
            moves = (self.count - EMA_START).clamp(min=0) / EMA_EVERY
            share = (1 / (1 + moves)).clamp(min=1 - EMA_DECAY)  # a plain mean at first, for short trainings
            moving = (self.count <= EMA_START) | (self.count.remainder(EMA_EVERY) == 0)
            share = torch.where(moving, share, 0.0)
            for mine, live in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(live, share)
        return {"loss/planner": loss.detach()}

    def distill_step(self, steps: int, updates: int) -> dict[str, torch.Tensor]:
        """One of the `updates` gradient steps of the student of `steps` denoising steps."""
        x, mask = self.windows.draw(self.args.planner_batch)
        loss = self.distill_loss(self.net, self.teacher, x, mask, steps, steps == self.args.distill_steps)
        self.descend(loss, 1 - self.count / updates)
        return {"loss/distill": loss.detach()}

    def transition_step(self, updates: int) -> dict[str, torch.Tensor]:
        """One of the `updates` gradient steps of P̂ on d, at three times the planner's learning rate.  D57"""
        windows = self.windows
        rows = windows.buffer.take(windows.buffer.draw(self.args.planner_batch, windows.rows))
        loss = self.transition_loss(self.model, rows)
        self.descend(loss, 3 - 3 * self.count / updates)
        return {"loss/transition": loss.detach()}

    def restart(self) -> None:
        """Before a halving, and before P̂: the student is its teacher, the optimizer fresh."""
        self.net.load_state_dict(self.teacher.state_dict())
        self.count.zero_()
        for state in self.opt.state.values():
            for x in state.values():
                x.zero_()

    def learn(self, score: Callable[[PlanActor], float] | None) -> None:
        """All phases, the first perhaps another run's; `score` of each student as actor, None: not asked for.

        r.phase yields the steps that are left, r.once is True once in a run's life: a stopped run goes on where it was.
        """
        r, args = self.r, self.args
        if args.from_planner and r.once("from_planner"):
            r.import_phase("planner", args.from_planner, self.settings, average=self.average)
        step_fn = r.capture(self.planner_step)
        for step in r.phase("planner", args.planner_steps):
            r.log(step, step_fn())
        if r.once("planner_end"):
            r.export_phase("planner", self.settings, average=self.average)
            self.teacher.load_state_dict(self.average.state_dict())
        until = 0  # one phase for all halvings: its steps go on
        for steps, updates in self.ladder:
            start, until = until, until + updates
            step_fn = r.capture(partial(self.distill_step, steps, updates))
            for step in r.phase("distill", until):
                if step == start:
                    self.restart()
                r.log(step, step_fn())
            if r.once(f"halving to {steps}"):
                self.teacher.load_state_dict(self.net.state_dict())
                student = PlanActor(self.teacher, steps, "zero").to(r.device)
                r.record(until, judge.student(self, student, unroll, score))
        updates = 2 * args.planner_steps if args.fit_transition and args.horizon > 1 else 0  # D57
        if r.once("transition") and updates == 0:
            self.restart()  # P̂ is the student as it is
        step_fn = r.capture(partial(self.transition_step, updates))
        for step in r.phase("transition", updates):
            if step == 0:
                self.restart()
            r.log(step, step_fn())

    def clone_into(self, nets: nn.ModuleDict) -> None:
        """Once: the last student becomes the actor's net; that trained on, the transition model's.  [Alg. 1, l. 5]"""
        if self.r.once("clone"):
            nets["actor"].net.load_state_dict(self.teacher.state_dict())
            nets["transition"].net.load_state_dict(self.net.state_dict())


# --- end shared: dual.phases ---


# NEW: the posterior of the actor's last layer, and acting with it
# --- shared: dual.laplace ---
EPISTEMIC_CAP, SHIFT_CAP = 0.25, 1.0  # variance, per dimension of the action: D53


def second_moment(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """M = Σ w f fᵀ / Σ w in float64: features (N, F), weights (N,) >= 0 -> (F, F); 0 where all weights are 0.  [Eq. 6]

    N_eff M / σ_j² with N_eff = Σ w is the Hessian of Eq. 5 in row j of W, exactly: rows do not mix. Raises
    FloatingPointError on anything not finite.
    """
    total, moment = 0.0, features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for f, w in zip(features.split(4_096), weights.double().split(4_096), strict=True):
        total, moment = total + w.sum(), moment + (f.double() * w[:, None]).T @ f.double()
    if not moment.isfinite().all():
        raise FloatingPointError("weights or features of the posterior are not finite")
    return moment / total if total > 0 else moment


def precisions(spectrum: torch.Tensor, n_eff: float, prior: float) -> torch.Tensor:
    """Eigenvalues of G = N_eff M + τ0 I from those of M; at least 1e-14 of the largest, where float64 ends.  [Eq. 6]"""
    g = n_eff * spectrum + prior
    return g.maximum(1e-14 * g.max())


def data_variance(spectrum: torch.Tensor, n_eff: float, prior: float) -> float:
    """tr(M G⁻¹) from the eigenvalues of M: the mean of f G⁻¹ f over the data, noise 1."""
    return (spectrum / precisions(spectrum, n_eff, prior)).sum().item()


def calibrate(spectrum: torch.Tensor, target_std: float, prior: float) -> float:
    """N_eff at which the root mean epistemic variance on data is target_std; 0 if it is less anyway.  D51"""
    low, high = 0.0, len(spectrum) / target_std**2  # where it is surely less: each term is below 1 / N_eff
    if data_variance(spectrum, 0.0, prior) <= target_std**2:
        return 0.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if data_variance(spectrum, middle, prior) > target_std**2:
            low = middle
        else:
            high = middle
    return high


def draw_offsets(
    basis: torch.Tensor, precision: torch.Tensor, null: torch.Tensor, scales: torch.Tensor, draws: int
) -> torch.Tensor:
    """Draws of W minus W, row j ~ N(0, s_j² G⁻¹), without a part along `null`: (draws, A, F) float32.  [Eq. 6]

    G by its eigenvectors (F, F) and eigenvalues (F,); s (A,); from the global generator. null (F,), of length 1: data
    say nothing along it, so the prior alone would set that part, and the next update turn it into noise: D56.
    """
    xi = torch.randn(len(basis), draws * len(scales), dtype=basis.dtype, device=basis.device)
    rows = (basis * precision.rsqrt() @ xi).T
    rows = rows - (rows @ null)[:, None] * null
    return (rows.view(draws, len(scales), -1) * scales[:, None]).float()


def ensemble(means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the sub-policies' means (K, B, A) -> (B, A) each; centred, float32 would cancel.  [Eq. 7]"""
    mean = means.mean(0)
    return mean, (means - mean).square().mean(0)


class Explorer:
    """Acts with N(mean, σ² + epistemic + λ d): the draws of W, the shift d, and what they add up to.  [Eqs. 7-8]"""

    def __init__(self, args: Args, actor: PlanActor, transition: PlanActor, windows: Windows | None):
        self.args, self.actor, self.transition, self.windows = args, actor, transition, windows
        device, width = actor.log_std.device, actor.net.head.in_features + 1
        self.offsets = torch.zeros(args.laplace_draws, actor.net.act_dim, width, device=device)
        self.n_eff_per_row = torch.zeros((), dtype=torch.float64, device=device)
        self.shift = torch.zeros((), device=device)  # d of the next step
        self.usual = torch.ones((), device=device)  # d without a shift; for the log
        self.tally = torch.zeros(5, device=device)  # steps, and sums of three variances and d; for the log

    def state(self) -> dict:
        """What a checkpoint holds, by name."""
        names = ("offsets", "n_eff_per_row", "shift", "usual", "tally")
        return {f"explorer_{k}": getattr(self, k) for k in names}

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """a ~ N(mean, σ² + epistemic + min(λ d, cap)), not yet in the box: (1, O) -> (1, A).  [Eqs. 7-8]: caps, D53"""
        args, actor = self.args, self.actor
        if args.uq == "latent":
            z = actor.noise(args.laplace_draws)
        else:
            z = actor.noise(1) if args.latent == "sample" else None  # one for all draws: U54
        f1, base = actor.features(obs if z is None else obs.expand(len(z), -1), z)
        means = actor.read(f1, base, actor.first_action)[:, None]  # (latents, 1, A)
        if args.uq == "laplace":
            means = means + (self.offsets @ f1.T).transpose(1, 2)  # (K, 1, A): in the last step only
        mean, epistemic = ensemble(means)
        epistemic, aleatoric = epistemic.clamp(max=EPISTEMIC_CAP), actor.std().square()
        shift = torch.zeros_like(self.shift)
        if args.shift_weight > 0:
            shift = (args.shift_weight * self.shift).clamp(max=SHIFT_CAP)
        parts = aleatoric.mean(), epistemic.mean(), shift, self.shift
        self.tally.add_(torch.stack([torch.ones_like(shift), *parts]))
        std = (aleatoric + epistemic + shift).sqrt()
        return mean + std * torch.randn_like(mean)

    @torch.no_grad()
    def observe(self, online: ReplayBuffer) -> None:
        """After an environment step, stored last: d of the next one, by the frozen P̂ (U57), on a device-side index."""
        if self.args.horizon > 1:
            self.shift.copy_(self.transition.prediction_error(online.take((online.size - 1)[None]))[0])

    def start(self, dataset: ReplayBuffer, weigh: Callable[[Batch], torch.Tensor]) -> dict[str, float]:
        """At the end of offline: first posterior, and, for the log, what d is without a shift."""
        logs = self.fit([dataset], weigh, first=True) if self.args.uq == "laplace" else {}
        return logs | (judge.usual_shift(self, dataset) if self.args.horizon > 1 else {})

    def some(self, total: int) -> torch.Tensor:
        """Indices of at most laplace_rows of so many rows, all different: U56."""
        index = torch.arange(total, device=self.shift.device)
        if total > self.args.laplace_rows:
            index = torch.randperm(total, device=self.shift.device)[: self.args.laplace_rows]
        return index

    def parts(self, buffers: list[ReplayBuffer]) -> list[Batch]:
        """Some rows of the buffers' union, in chunks."""
        index, found, first = self.some(sum(map(len, buffers))), [], 0
        for b in buffers:
            mine = index[(index >= first) & (index < first + len(b))] - first
            found, first = [*found, *map(b.take, mine.split(4_096))], first + len(b)
        return found

    def elbo_features(self, index: torch.Tensor) -> torch.Tensor:
        """What W reads in Eq. 3, at random noise levels of the windows at `index` (B,) -> (B, w + 1).  [Remark 3.3]"""
        net, (x, _) = self.actor.net, self.windows.take(index)
        u, given = 1 - torch.rand(len(x), device=x.device), torch.zeros_like(index, dtype=torch.bool)
        z, _, _ = noised(x, u, torch.randn_like(x), given, net.act_dim)
        f = net.features(z, u, given.to(x))
        return torch.cat([f, torch.ones_like(f[:, :1])], 1)

    @torch.no_grad()
    def fit(
        self, buffers: list[ReplayBuffer], weigh: Callable[[Batch], torch.Tensor], first: bool = False
    ) -> dict[str, float]:
        """New posterior from rows of `buffers`, weighed (B,) >= 0, and new draws of it.  [Eq. 6, Thm. 3.4]: rows, U56

        N_eff, set at the `first` fit, and noise are ours, D51; --laplace-std 0 --laplace-noise sigma are Eq. 6's. Waits
        for the device; not part of a gradient step.
        """
        args, actor = self.args, self.actor
        if args.laplace_weights == "elbo":
            chunks = self.some(len(self.windows.last)).split(4_096)
            features = torch.cat([self.elbo_features(i) for i in chunks])
            weights = torch.ones(len(features), device=features.device)
        else:
            batches = self.parts(buffers)
            features = torch.cat([actor.features(b.obs)[0] for b in batches])
            weights = weigh(Batch(*map(torch.cat, zip(*batches, strict=True))))
        spectrum, basis = torch.linalg.eigh(second_moment(features, weights))
        spectrum, rows = spectrum.clamp(min=0), sum(map(len, buffers))
        if args.laplace_std == 0:
            self.n_eff_per_row.copy_(weights.double().mean())
        elif first:
            self.n_eff_per_row.fill_(calibrate(spectrum, args.laplace_std, args.laplace_prior) / rows)
        n_eff = self.n_eff_per_row.item() * rows
        precision = precisions(spectrum, n_eff, args.laplace_prior)
        scales = actor.std() if args.laplace_noise == "sigma" else torch.ones_like(actor.log_std)
        offsets = draw_offsets(basis, precision, actor.null(), scales.double(), args.laplace_draws)
        self.offsets.copy_(offsets)
        spread = data_variance(spectrum, n_eff, args.laplace_prior) * scales.square().mean().item()
        condition = (precision[-1] / precision[1]).item()  # the first is the null direction's
        return {"laplace/n_eff": n_eff, "laplace/condition": condition, "laplace/data_std": spread**0.5}


def untrained_explorer(args: Args, task: data.Task, steps: int, uq: str) -> Explorer:
    """One that acts in `steps` denoising steps, at the task's sizes: for judge.time_acting."""
    halvings(args)  # refuses what cannot be
    unit = torch.ones(task.obs_dim)
    net = PlannerNet(args.horizon, task.act_dim, 0 * unit, unit, args.planner_width, args.planner_blocks)
    actor = PlanActor(net, steps, args.latent).to(run.pick_device(args.device))
    return Explorer(replace(args, uq=uq), actor, actor, None)


# --- end shared: dual.laplace ---


# NEW: what Cal-QL adds to the method: actions in the box, and what the posterior's rows weigh
# --- shared: calql_dual.box ---
BOX = 0.9  # |u| up to which `box` is the identity: D58
VALUE_ACTIONS = 4  # per state, for V: U64


def box(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions in the box, and log |da/du| of each: a = u up to BOX, BOX + (1 - BOX) tanh(x) beyond it: D58.

    x = (|u| - BOX) / (1 - BOX), u's sign comes back; log(1 - tanh² x) = 2 (ln 2 - x - softplus(-2x)).  [SAC App. C]
    """
    x = (u.abs() - BOX).relu() / (1 - BOX)
    return u.clamp(-BOX, BOX) + (1 - BOX) * u.sign() * x.tanh(), 2 * (math.log(2) - x - F.softplus(-2 * x))


def boxed(
    mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Action box(u), u = mean + σ · noise, and its log π: (..., A), log σ also (A,) -> (..., A), (...,): D58."""
    actions, log_slope = box(mean + log_std.exp() * noise)
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return actions, (log_normal - log_slope).sum(-1)


@torch.no_grad()
def bounded_weight(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """exp(clip((Q - V) / std(Q - V), -5, 5)) over all rows of a fit: both (N,) -> (N,).  In place of Eq. 6's Q: U64"""
    adv = q - v
    scale = adv.std(correction=0).maximum(1e-5 * v.abs().mean())  # what is less is rounding
    return (adv / scale.clamp(min=1e-12)).clamp(-5.0, 5.0).exp()


@torch.no_grad()
def posterior_weight(nets: nn.ModuleDict, batch: Batch) -> torch.Tensor:
    """bounded_weight of Q, the least of qf, over V, its mean over VALUE_ACTIONS actions of π: (N,).  U64"""
    q, v = [], []
    for obs, actions in zip(batch.obs.split(4_096), batch.actions.split(4_096), strict=True):
        mean, log_std = nets["actor"](obs)
        noise = torch.randn(len(obs), VALUE_ACTIONS, actions.shape[1], device=obs.device)
        drawn, _ = boxed(mean[:, None], log_std, noise)
        both = q_of_many(nets["qf"], obs, torch.cat([actions[:, None], drawn], 1)).amin(0)
        q, v = [*q, both[:, 0]], [*v, both[:, 1:].mean(1)]
    return bounded_weight(torch.cat(q), torch.cat(v))


# --- end shared: calql_dual.box ---


# calql.py's: critics, nets, losses, returns, training
# --- shared: calql.critics ---
def orthogonal(sizes: tuple, gains: list[float], copies: int) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Weights (copies, in, out) orthogonal with the layer's gain, biases (copies, 1, out) zero.  [CORL]"""
    weights = [torch.empty(copies, i, o) for i, o in pairwise(sizes)]
    for weight, gain in zip(weights, gains, strict=True):
        for k in range(copies):
            nn.init.orthogonal_(weight[k], gain)
    return nn.ParameterList(weights), nn.ParameterList([torch.zeros(copies, 1, o) for o in sizes[1:]])


class DeepTwinQ(nn.Module):
    """Two critics as stacked weights, one batched matmul per layer: obs (B, O), actions (B, A) -> (2, B).  [CORL]"""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, layers: int):
        super().__init__()
        gains = [math.sqrt(2)] * layers + [1e-2]  # D6
        self.weight, self.bias = orthogonal((obs_dim + act_dim, *[hidden] * layers, 1), gains, 2)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], -1).expand(2, -1, -1)
        *hidden, (weight_out, bias_out) = zip(self.weight, self.bias, strict=True)
        for weight, bias in hidden:
            x = torch.baddbmm(bias, x, weight).relu_()
        return torch.baddbmm(bias_out, x, weight_out).squeeze(-1)


# --- end shared: calql.critics ---


# NEW
def make_calql_dual_nets(net: PlannerNet, args: Args, obs_dim: int, act_dim: int) -> nn.ModuleDict:
    """actor, transition (frozen), both clones of `net`; qf, q_target (a frozen copy of qf); weights as in calql.py."""
    nets = nn.ModuleDict()
    nets["actor"] = PlanActor(deepcopy(net), args.distill_steps, args.latent)
    nets["transition"] = PlanActor(deepcopy(net), args.distill_steps, "zero").requires_grad_(False)
    nets["qf"] = DeepTwinQ(obs_dim, act_dim, args.hidden, args.critic_layers)
    nets["q_target"] = DeepTwinQ(obs_dim, act_dim, args.hidden, args.critic_layers)
    nets["weights"] = nn.ParameterDict({"log_alpha": torch.zeros(()), "log_alpha_prime": torch.ones(())})
    nets["q_target"].load_state_dict(nets["qf"].state_dict())
    nets["q_target"].requires_grad_(False)
    return nets


# --- shared: calql.losses ---
def q_of_many(qf: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Q of M actions per state: obs (B, O), actions (B, M, A) -> (K, B, M) of K critics.

    One evaluation on a GPU; on a CPU some states at a time, so that what lies between the layers stays in its cache.
    """
    rows, many, _ = actions.shape
    states = rows if actions.is_cuda else max(2_048 // many, 1)
    parts = [
        qf(o.repeat_interleave(many, 0), a.flatten(0, 1))
        for o, a in zip(obs.split(states), actions.split(states), strict=True)
    ]
    return torch.cat(parts, 1).view(-1, rows, many)


def conservative_gap(
    q: torch.Tensor, q_data: torch.Tensor, log_probs: torch.Tensor, bound: torch.Tensor | None, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """R per row: logsumexp of importance-weighted Q, minus Q on data.  [CQL Eq. 4; Cal-QL §5; DARE Eq. 1]

    q (K, B, 3n): uniform actions, then those of π(s), then of π(s'), all at s; log_probs (B, 3n) their log-densities;
    bound (B,) the return G below which policy actions are not pushed, None for CQL; R is at least `floor`
    -> R (K, B), share below G ().
    """
    policy = torch.arange(q.shape[-1], device=q.device) >= q.shape[-1] // 3
    share = torch.zeros((), device=q.device)
    if bound is not None:
        below = policy & (q < bound[:, None])
        share = below.sum() / (below.numel() * 2 // 3)
        q = torch.where(below, bound[:, None], q)  # no gradient where G wins
    return ((q - log_probs).logsumexp(-1) - q_data).clamp(min=floor), share


def frozen_q(qf: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """qf(obs, actions) (K, B) with gradients to the actions but none to the critic."""
    weights = {k: p.detach() for k, p in qf.named_parameters()}
    return torch.func.functional_call(qf, weights, (obs, actions))


def draw_noise(rows: int, act_dim: int, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform actions (B, n, A) and N(0, I) (B, 3n + 1, A) for π(s), π(s'), the backup, the actor's own."""
    uniform = torch.rand(rows, n, act_dim, device=device) * 2 - 1
    return uniform, torch.randn(rows, 3 * n + 1, act_dim, device=device)


# --- end shared: calql.losses ---


# --- shared: calql.returns ---
def mc_returns(rewards: np.ndarray, ends: np.ndarray, gamma: float, failure: float | None) -> np.ndarray:
    """G_t = r_t + γ G_{t+1} within each episode, (N,) float32; rewards (N,) in training units.  [Cal-QL §5]

    Episodes end where the file says (D7), and start from 0 there, terminated or not: U2. With `failure`, the training
    reward of a failing step, an episode of nothing else has failure / (1 - γ) on every row.
    """
    returns, stops = np.zeros(len(rewards)), [*np.flatnonzero(ends), len(rewards) - 1]
    start = 0
    for stop in dict.fromkeys(stops):
        episode = slice(start, stop + 1)
        if failure is not None and np.all(rewards[episode] == np.float32(failure)):
            returns[episode] = failure / (1 - gamma)
        else:
            g = 0.0
            for t in range(stop, start - 1, -1):
                g = returns[t] = float(rewards[t]) + gamma * g
        start = stop + 1
    return returns.astype(np.float32)


class Returns:
    """Monte-Carlo returns of the dataset's rows, and of own rows where calibration goes on online: D3.

    Own rows have theirs when their episode is over; only such rows are drawn then. Rows of an episode that was broken
    off (a simulator that does not repeat it after a stop) never have: -inf, no bound.
    """

    def __init__(self, args: Args, dataset: data.Dataset, units: data.Units, buffer: ReplayBuffer):
        if args.calibrate_online and not args.calibrate:
            raise run.UsageError("--calibrate-online", "with --no-calibrate", "calibration offline too")
        if args.calibrate_online and not dataset.ends.any():
            got, allowed = "a dataset without episode ends", "one with terminals or timeouts"
            raise run.UsageError("--calibrate-online", got, allowed)
        self.args, self.buffer, device = args, buffer, buffer.table.device
        self.dataset = self.of(units.rewards(dataset.rewards), dataset.ends).to(device)
        self.own = torch.full((len(buffer.table),), -torch.inf, device=device)
        # own rows of episodes that are over
        self.finished = torch.zeros((), dtype=torch.int64, device=device)

    def state(self) -> dict:
        """What a checkpoint holds, by name."""
        return {"online_mc": self.own, "finished": self.finished}

    def of(self, rewards: np.ndarray, ends: np.ndarray) -> torch.Tensor:
        failure = self.args.reward_bias if self.args.sparse_reward else None  # training reward of a raw 0
        return torch.from_numpy(mc_returns(rewards, ends, self.args.gamma, failure))

    @property
    def drawable(self) -> torch.Tensor | None:
        """How many own rows may be drawn, on the device; None for all."""
        return self.finished if self.args.calibrate_online else None

    def add_episode(self, length: int) -> None:
        """The last `length` own rows are an episode."""
        if self.args.calibrate_online:
            rewards, rows = self.buffer.last(length).rewards.cpu().numpy(), self.buffer.rows
            ends = np.arange(1, length + 1) == length
            self.own[rows - length : rows] = self.of(rewards, ends).to(self.own.device)
            self.finished.fill_(rows)


# --- end shared: calql.returns ---


# NEW: calql.py's losses, with μ per state, one σ, and `boxed` for its tanh
def dual_losses(
    nets: nn.ModuleDict,
    batch: Batch,
    bound: torch.Tensor | None,
    weight: float | torch.Tensor,
    noise: tuple,
    args: Args,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of critics, actor, α and α', which share no parameter; from the old parameters: D1.

    bound (B,) Monte-Carlo returns or None; weight = α_cql, one number or one per row (B,); noise as from draw_noise.
    """
    n, (uniform, normal) = args.cql_n_actions, noise
    rows, act_dim = batch.actions.shape
    mean, log_std = nets["actor"](torch.cat([batch.obs, batch.next_obs]))  # one pass, (2B, A), (A,)
    mean, next_mean = mean[:, None].split(rows)
    # the actor's own action (B, 1, A) and its log π (B, 1), with gradient
    new_actions, log_pi = boxed(mean, log_std, normal[:, 3 * n :])
    backups = n if args.max_target_backup else 1
    with torch.no_grad():  # n of π(s), n of π(s'), the backup's of π(s'), all with σ only: U65
        means = torch.cat([mean.expand(-1, n, -1), next_mean.expand(-1, n + backups, -1)], 1)
        sampled, sampled_log_prob = boxed(means, log_std, normal[:, : 2 * n + backups])
        q_backups = q_of_many(nets["q_target"], batch.next_obs, sampled[:, 2 * n :])  # (2, B, backups)
        q_next = q_backups.amin(0).amax(-1)  # no entropy term [CORL]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * q_next
        log_uniform = torch.full((rows, n), -act_dim * math.log(2), device=target.device)
        log_probs = torch.cat([log_uniform, sampled_log_prob[:, : 2 * n]], 1)
    actions = torch.cat([batch.actions[:, None], uniform, sampled[:, : 2 * n]], 1)
    q = q_of_many(nets["qf"], batch.obs, actions)  # (2, B, 1 + 3n)
    td_loss = (q[..., 0] - target).square().mean(1).sum()  # [DARE Eq. 1], D2
    gap, share = conservative_gap(q[..., 1:], q[..., 0], log_probs, bound, args.cql_clip_min)
    lagrange_loss = torch.zeros((), device=gap.device)
    if args.lagrange:
        multiplier = nets["weights"]["log_alpha_prime"].exp().clamp(0.0, 1e6)
        cql_loss = (multiplier.detach() * weight * (gap - args.target_gap)).mean(1).sum()
        lagrange_loss = -0.5 * (multiplier * weight * (gap.detach() - args.target_gap)).mean(1).sum()
    else:
        cql_loss = (weight * gap).mean(1).sum()  # α R [DARE Eq. 1]
    log_alpha = nets["weights"]["log_alpha"]
    missing = log_pi.detach() - act_dim  # of the target entropy, -A
    alpha_loss = -(log_alpha * missing).mean()  # [SAC, arXiv 1812.05905 §5]
    q_new = frozen_q(nets["qf"], batch.obs, new_actions[:, 0]).amin(0)
    actor_loss = (log_alpha.detach().exp() * log_pi[:, 0] - q_new).mean()  # [SAC §4.2]: for Eq. 5, U63
    logs = {"loss/q": td_loss, "loss/actor": actor_loss, "loss/alpha": alpha_loss, "cql/gap": gap.mean()}
    logs |= {"cql/bound_share": share, "q/mean": q[..., 0].mean(), "policy/log_prob": log_pi.mean()}
    logs |= {"policy/outside": (mean.abs() - 1).relu().mean(), "log_std/mean": log_std.mean()}
    logs |= {"alpha/entropy": log_alpha.exp(), "alpha/lagrange": nets["weights"]["log_alpha_prime"].exp()}
    total = td_loss + cql_loss + lagrange_loss + alpha_loss + actor_loss
    return total, {k: v.detach() for k, v in logs.items()}


# --- shared: calql.update ---
def update(nets: nn.ModuleDict, opt: torch.optim.Optimizer, loss: torch.Tensor, polyak: float) -> None:
    """One gradient step and the target update; nothing in here waits for the GPU."""
    opt.zero_grad(set_to_none=True)
    loss.backward()  # disjoint parameters: the same as one backward per loss
    opt.step()
    with torch.no_grad():
        torch._foreach_lerp_([*nets["q_target"].parameters()], [*nets["qf"].parameters()], polyak)


def make_calql_optimizer(
    nets: nn.ModuleDict, policy_lr: float, critic_lr: float, device: torch.device
) -> torch.optim.Adam:
    """Adam over actor and α at one rate, critics and α' at the other."""
    weights = nets["weights"]
    policy = {"params": [*nets["actor"].parameters(), weights["log_alpha"]], "lr": policy_lr}
    critic = {"params": [*nets["qf"].parameters(), weights["log_alpha_prime"]], "lr": critic_lr}
    return torch.optim.Adam([policy, critic], fused=True, capturable=device.type == "cuda")


# --- end shared: calql.update ---


def train(args: Args) -> dict[str, float]:
    task = data.get_task(args.env)
    if args.time_acting:  # NEW
        return judge.time_acting(args, task, untrained_explorer)
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    n_offline = round(args.offline_frac * args.batch_size)
    run.check_batch(args, dataset=n_offline, own=args.batch_size - n_offline)
    halvings(args)  # NEW: refuses what cannot be
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    moments = dataset.moments() if args.normalize_obs else None
    units = data.Units(args.reward_scale, args.reward_bias, moments)
    offline = dataset.buffer(units, r.device)
    online = offline.like(args.online_steps)
    returns = Returns(args, dataset, units, online)
    interaction = data.Interaction(data.make_env(task, units), online, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    windows = Windows(offline, dataset.ends, args.horizon, args.normalize_windows)  # NEW
    planner = Planner(r, args, windows, task.act_dim, dataset.sha256)
    nets = make_calql_dual_nets(planner.net, args, task.obs_dim, task.act_dim).to(r.device)
    opt = make_calql_optimizer(nets, args.policy_lr, args.critic_lr, r.device)
    explorer = Explorer(args, nets["actor"], nets["transition"], windows)  # NEW

    @torch.no_grad()
    def act(obs: torch.Tensor, actor: nn.Module = nets["actor"]) -> torch.Tensor:  # deterministic
        return box(actor(obs)[0])[0]  # μ of W itself, no noise: U54

    def explore(obs: torch.Tensor) -> torch.Tensor:
        return box(explorer.act(obs))[0]  # NEW: both kinds of doubt act before the box: U63

    def score(actor: nn.Module) -> float:  # NEW
        return evaluate(partial(act, actor=actor), r.device)["eval/score"]

    added = planner.state() | explorer.state()
    r.register(nets=nets, opt=opt, online=online, interaction=interaction, **returns.state(), **added)
    compiled_losses = r.compiled(dual_losses)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    def gradient_step(batch: Batch, bound: torch.Tensor | None, weight: float) -> dict[str, torch.Tensor]:
        noise = draw_noise(args.batch_size, task.act_dim, args.cql_n_actions, r.device)
        loss, logs = compiled_losses(nets, batch, bound, weight, noise, args)
        if args.bc_coef > 0:  # NEW [Eq. 3]: the planner's loss for the actor, off: U61
            bc = planner.planner_loss(nets["actor"].net, *windows.draw(args.batch_size))
            loss, logs = loss + args.bc_coef * bc, logs | {"loss/bc": bc.detach()}
        update(nets, opt, loss, args.polyak)
        return logs

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        index = offline.draw(args.batch_size)
        bound = returns.dataset[index] if args.calibrate else None
        return gradient_step(offline.take(index), bound, args.cql_weight)

    if args.from_offline and r.once("from_offline"):
        r.import_phase("offline", args.from_offline, offline_settings, nets=nets, opt=opt)
    if not args.from_offline:  # NEW: planner and students, unless the offline phase is another run's
        planner.learn(score if args.eval_halvings else None)
        planner.clone_into(nets)
    step_fn = r.capture(offline_step)
    for step in r.phase("offline", args.offline_steps):
        r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 and step + 1 < args.offline_steps:
            r.record(step + 1, evaluate(act, r.device))
    if r.once("offline_end"):
        r.record(args.offline_steps, evaluate(act, r.device))
        r.export_phase("offline", offline_settings, nets=nets, opt=opt)  # U3
        evaluate.export(act, r)

    # NEW: the posterior [Alg. 1, l. 9]
    weigh = partial(posterior_weight, nets)
    if r.once("posterior"):
        r.seed("posterior")
        r.record(args.offline_steps, explorer.start(offline, weigh))

    # online: one environment step, then utd gradient steps on half dataset, half own experience
    def online_step() -> dict[str, torch.Tensor]:
        n_online = args.batch_size - n_offline
        index = offline.draw(n_offline), online.draw(n_online, returns.drawable)
        batch = mix(offline.take(index[0]), online.take(index[1]))
        bound = None  # D3
        if args.calibrate_online:
            bound = torch.cat([returns.dataset[index[0]], returns.own[index[1]]])
        return gradient_step(batch, bound, args.cql_weight_online)

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if interaction.obs is None:  # NEW: an episode's first step has no shift: U57
            explorer.shift.zero_()
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
            returns.add_episode(episode["train/episode_length"])
        explorer.observe(online)  # NEW
        if step >= args.warmup_steps and (interaction.episode or not args.calibrate_online):
            for _ in range(args.utd):
                logs = step_fn()
            r.log(step, logs | judge.acting(explorer))
        if (step + 1) % run.LOG_EVERY == 0:  # NEW
            explorer.tally.zero_()
        if args.uq == "laplace" and (step + 1) % args.laplace_every == 0:  # NEW
            r.record(step + 1, judge.error_rank(explorer, online) | explorer.fit([offline, online], weigh))
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act, r.device))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
