"""DUAL on SO2 + OFF2ON: its distilled planner acts and explores, critics follow perturbed targets at its next action.

Paper    Bui, Jazbec, Nalisnick, Liu, "Efficient and Uncertainty-Aware Diffusion Framework for Offline-to-Online
         Reinforcement Learning", arXiv 2605.30776v1: Eq., Alg., Table below; no code is public. Distillation: Salimans,
         Ho, ICLR 2022, arXiv 2202.00512. Diffuser: Janner et al., ICML 2022, arXiv 2205.09991. Backbone: so2.py, where
         SO2 and OFF2ON are.
Idea     As calql_dual.py: a diffusion planner of windows, distilled into one step, whose first action is the mean of a
         Gaussian actor; a posterior of its last layer, and the error of the frozen student's next state, widen the
         policy online. Here the critics are an ensemble: each follows its own target at a noisy next action of that
         actor, many updates to one of the actor, which sees the least of all, on rows that look like its own.
Symbols  τ window of H = horizon steps, each [a, s] | u noise level | v what the net predicts | T denoising steps |
         μ, σ actor | W last layer, f its features | G precision of a row of W, M its part from data | K laplace_draws,
         in so2.py's equations critics | λ shift_weight | d prediction error | P̂ transition | Q, α, α_cql, ε, w as there
Read     NEW: planner, distillation; PlanActor; Planner; posterior, Explorer: all dual.py's; the box, and the rows'
         weights: calql_dual.py's. Of so2.py: EnsembleQ, own_targets, value_losses, balanced replay; losses,
         dual_actor_losses and update are so2.py's with this actor. Then train.
Notes    D1, D2, D6, D92, D100, D101, D102, D103, D104, D105, U1, U100, U101, U102 as in so2.py. Of the code shared with
         dual.py, which says more:
         D50 v on the cosine schedule for Eq. 3's noise. D51 unit noise, prior laplace_prior, N_eff from laplace_std for
            Eq. 6's spike. D52 P̂ asked with the executed action. D53 epistemic variance at most 0.25, λ d at most 1.
         D56 W not drawn along the one direction that features never take. D57 P̂ is the student trained on d.
         U50 planner network: residual MLP. U51 H is 4, in AntMaze 32. U52 32 -> 1 denoising steps; rates; shrunk noise.
         U53 what is known stands in the noised input. U54 latent of μ: zero; evaluation: μ of W itself.
         U55 σ: a parameter per action. U56 draws: how many, when fitted, kept as offsets. U57 norm of d; P̂ is frozen.
         U61 no diffusion loss during RL; --bc-coef adds Eq. 3 on dataset windows to the actor's. With calql_dual.py:
         D58 a = box(u), u ~ N(μ, σ²): the identity up to 0.9, beyond it a tanh, with its Jacobian in log π: the text's
            Gaussian has no bounds.
         U63 actor's loss: SAC's, as SO2's; the draws of W, σ, the epistemic part and the shift act on u.
         U64 Eq. 6 wants a weighted likelihood of Q, which may be negative: rows weigh exp((Q - V) / std), the exponent
            within ±5, Q the least of all critics, V the mean Q of 4 actions of π.
         U65 a' in TD targets and in the regulariser have σ only: the epistemic part and the shift are for acting.
         Of this file:
         D59 1M online steps, as the paper; SO2's are 150,000. The warm-up is SO2's.
         U140 ε is added to a' behind the box and clipped there, hard, as SO2's behind its tanh; log π is of a' itself.
         U141 actor's rate online: the offline one, as with other backbones; SO2's, for its small net, is 1e-3.
         U142 rows of the posterior are uniform over dataset and own ones; balanced replay is for the losses.
Metrics  so2.py's, but policy/data_log_prob; dual.py's; policy/outside: mean of relu(|μ| - 1).
Run      python algorithms/so2_dual.py --env hopper-medium-v2 --seed 0; another run's phase: --from-offline, or
         --from-planner (dual.py's or calql_dual.py's too, if the planner settings agree). Ablations as in dual.py:
         --horizon 1 --shift-weight 0 | --distill-steps 32 | --uq none | --uq latent | --laplace-weights elbo |
         --time-acting; as in so2.py: --no-perturbation | --no-balanced-replay
Cost     published sizes on a busy core: one offline step a second, two seconds per environment step of 10 updates;
         reacher-mini-v0: four CPU minutes; GPU not measured.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, judge, run
from common.buffer import Batch, ReplayBuffer
from common.run import Count, Fraction, Natural, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [OFF2ON]
    online_steps: Natural = 1_000_000  # environment steps [§5.1]; so2.py's are fewer: D59
    from_offline: Path | None = None  # run directory (or its offline.pt) to take the offline phase from
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it works
    compile: bool | None = None  # compile and capture the gradient step; default: on for cuda, off for cpu
    out_dir: Path = Path("runs")  # the run lives in <out-dir>/<file>/<env>/seed<seed>
    overwrite: bool = False  # start anew instead of resuming
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to the run directory, for TensorBoard
    eval_every: Count = 5_000  # steps of the running phase [PEX, CORL]: D105
    eval_episodes: Count = 10  # episodes of an evaluation [PEX, CORL]: D105
    # CQL with an ensemble
    batch_size: Several = 256  # transitions [OFF2ON]; online without balanced replay: own rows [SO2]
    gamma: Share = 0.99  # discount [SO2, OFF2ON]
    polyak: Rate = 0.005  # share of qf copied into q_target at every gradient step [SO2, OFF2ON]
    policy_lr: Positive = 3e-4  # Adam, actor and entropy weight [OFF2ON]; offline
    critic_lr: Positive = 3e-4  # Adam, critics and Lagrange multiplier [OFF2ON]; there is none; offline
    hidden: Count = 256  # width of the hidden layers [SO2, OFF2ON]; the actor's is planner_width
    critic_layers: Count = 3  # hidden layers of each critic [SO2]; OFF2ON 2
    n_critics: Count = 10  # K, in the ensemble [SO2; OFF2ON: five pairs]: D103
    cql_weight: Weight = 5.0  # α_cql offline [CQL's code]; online there is none [SO2, OFF2ON]
    cql_n_actions: Count = 10  # of each of three kinds: uniform, π(s), π(s') [CORL]
    normalize_obs: bool = False  # (obs - mean) / (std + 1e-3) of the dataset [CORL]; not in SO2, OFF2ON
    # online
    warmup_steps: Natural = 5_000  # environment steps without updates, counted in online_steps [SO2]
    utd: Count = 10  # gradient steps per environment step [SO2]; of the critics, and one of the actor
    policy_lr_online: Positive = 3e-4  # Adam, actor online; so2.py's is 1e-3: U141
    critic_lr_online: Positive = 1e-3  # Adam, critics online [SO2]
    entropy_weight: Weight = 0.2  # α online [SO2]: U102
    # online: perturbed targets
    perturbation: bool = True  # off: targets at π's own next action
    perturbation_std: Weight = 0.3  # of ε [SO2]
    perturbation_clip: Weight = 0.6  # largest |ε| [SO2]
    # online: balanced replay
    balanced_replay: bool = True  # off: SO2 alone: U100
    mixed_rows: Count = 2_304  # rows of dataset and own ones together, beside batch_size own ones [SO2]
    own_frac: Fraction = 0.5  # f, share of own rows in the first draws [OFF2ON]
    ratio_batch: Count = 256  # rows of either kind in a step of the density ratio [OFF2ON]
    ratio_lr: Positive = 3e-4  # Adam, density ratio [OFF2ON]
    ratio_hidden: Count = 256  # width of its two hidden layers [OFF2ON]
    ratio_temperature: Positive = 5.0  # T, priorities are w^(1/T) [OFF2ON]
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
    "antmaze-": dict(eval_every=10_000, eval_episodes=100, horizon=32),  # [CORL]; no table has it there: U101, U51
    "maze2d-": dict(eval_episodes=100),  # [CORL]
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128, mixed_rows=1_152,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, normalize_obs=True, utd=2,
        n_critics=5, ratio_hidden=64, ratio_batch=128, ratio_lr=1e-3,
        planner_steps=3_000, planner_width=64, planner_blocks=1, planner_lr=1e-3, halving_steps=300,
        laplace_every=1_000, laplace_rows=10_000,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50, cql_weight=2.0, entropy_weight=0.01),
}  # fmt: skip
# --- shared: dual.settings ---
PLANNER_SETTINGS = (  # NEW: what a planner depends on, beside the dataset
    "horizon", "planner_steps", "planner_batch", "planner_lr", "planner_width", "planner_blocks",
    "normalize_windows", "normalize_obs",
)  # fmt: skip
# --- end shared: dual.settings ---
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "policy_lr", "critic_lr", "hidden", "critic_layers",
    "n_critics", "cql_weight", "cql_n_actions", "normalize_obs",
    *PLANNER_SETTINGS[:-1], "teacher_steps", "distill_steps", "halving_steps", "latent", "bc_coef", "fit_transition",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "perturbation": ("perturbation_std", "perturbation_clip"),
    "balanced_replay": ("own_frac", "ratio_batch", "ratio_lr", "ratio_hidden", "ratio_temperature"),
    "not balanced_replay": ("mixed_rows",),
    "uq == 'laplace'": (
        "laplace_weights", "laplace_noise", "laplace_every", "laplace_rows", "laplace_std", "laplace_prior",
    ),
    "uq != 'none'": ("laplace_draws",),
    "teacher_steps > distill_steps": ("halving_steps", "eval_halvings"),
}  # fmt: skip


# NEW: from here to so2.py's blocks, DUAL. First the planner, a diffusion over windows of actions and states.
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


# NEW: what a SAC-type loss adds to the method: actions in the box, and what the posterior's rows weigh
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


# so2.py's: critics, nets, losses, balanced replay, training
# --- shared: apl.critics ---
def orthogonal(sizes: tuple, gains: list[float], copies: int) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Weights (copies, in, out) orthogonal with the layer's gain, biases (copies, 1, out) zero.  [CORL]"""
    weights = [torch.empty(copies, i, o) for i, o in pairwise(sizes)]
    for weight, gain in zip(weights, gains, strict=True):
        for k in range(copies):
            nn.init.orthogonal_(weight[k], gain)
    return nn.ParameterList(weights), nn.ParameterList([torch.zeros(copies, 1, o) for o in sizes[1:]])


class EnsembleQ(nn.Module):
    """K critics as stacked weights, one batched matmul per layer: obs (B, O), actions (B, A) -> (K, B)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, layers: int, critics: int):
        super().__init__()
        gains = [math.sqrt(2)] * layers + [1e-2]  # D6, D92
        self.weight, self.bias = orthogonal((obs_dim + act_dim, *[hidden] * layers, 1), gains, critics)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        *hidden, (weight_out, bias_out) = zip(self.weight, self.bias, strict=True)
        x = torch.cat([obs, actions], -1).expand(len(weight_out), -1, -1)
        for weight, bias in hidden:
            x = torch.baddbmm(bias, x, weight).relu_()
        return torch.baddbmm(bias_out, x, weight_out).squeeze(-1)


# --- end shared: apl.critics ---


# NEW
def make_so2_dual_nets(net: PlannerNet, args: Args, obs_dim: int, act_dim: int) -> nn.ModuleDict:
    """actor, transition (frozen), both clones of `net`; qf, q_target (a frozen copy of qf); weights as in so2.py."""
    nets = nn.ModuleDict()
    nets["actor"] = PlanActor(deepcopy(net), args.distill_steps, args.latent)
    nets["transition"] = PlanActor(deepcopy(net), args.distill_steps, "zero").requires_grad_(False)
    nets["qf"] = EnsembleQ(obs_dim, act_dim, args.hidden, args.critic_layers, args.n_critics)
    nets["q_target"] = EnsembleQ(obs_dim, act_dim, args.hidden, args.critic_layers, args.n_critics)
    nets["weights"] = nn.ParameterDict({"log_alpha": torch.zeros(())})
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


# --- shared: so2.targets ---
def draw_perturbation(rows: int, act_dim: int, args: Args, device: torch.device) -> torch.Tensor:
    """ε = clip(N(0, perturbation_std²), ±perturbation_clip), (B, A).  [SO2]"""
    noise = args.perturbation_std * torch.randn(rows, act_dim, device=device)
    return noise.clamp_(-args.perturbation_clip, args.perturbation_clip)


@torch.no_grad()
def own_targets(
    nets: nn.ModuleDict,
    batch: Batch,
    next_policy: tuple[torch.Tensor, torch.Tensor],
    perturbation: torch.Tensor | None,
    alpha: float | torch.Tensor,
    gamma: float,
) -> torch.Tensor:
    """y_k = r + γ (1 - terminated) (Q̂_k(s', clip(a' + ε, ±1)) - α log π(a'|s')), (K, B): each critic's own.  [SO2]

    next_policy is a' ~ π(s') (B, A) and its log π (B,); perturbation (B, A) is ε, or None for 0; log π is of a'
    without it.
    """
    next_actions, next_log_pi = next_policy
    if perturbation is not None:
        next_actions = (next_actions + perturbation).clamp(-1.0, 1.0)
    soft = nets["q_target"](batch.next_obs, next_actions) - alpha * next_log_pi
    return batch.rewards + gamma * (1 - batch.terminations) * soft


def value_losses(
    nets: nn.ModuleDict, batch: Batch, target: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Online: Σ_k mean (Q_k - y_k)² over the rows, target (K, B), and its logs.  [SO2]"""
    q = nets["qf"](batch.obs, batch.actions)
    loss = (q - target).square().mean(1).sum()  # D2
    logs = {"loss/q": loss, "q/mean": q.mean(), "q/spread": q.std(0, correction=0).mean()}
    return loss, {k: v.detach() for k, v in logs.items()}


# --- end shared: so2.targets ---


# NEW: so2.py's losses, with μ per state, one σ, and `boxed` for its tanh
def losses(
    nets: nn.ModuleDict, batch: Batch, noise: tuple, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Offline: sum of the losses of critics, actor and α, which share no parameter; from the old parameters: D1.

    noise as from draw_noise.
    """
    n, (uniform, normal) = args.cql_n_actions, noise
    rows, act_dim = batch.actions.shape
    log_alpha = nets["weights"]["log_alpha"]
    alpha = log_alpha.detach().exp()
    means, log_std = nets["actor"](torch.cat([batch.obs, batch.next_obs]))  # one pass, (2B, A), (A,)
    mean, next_mean = means.split(rows)
    next_policy = boxed(next_mean, log_std, normal[:, 2 * n])  # σ only, as all of these: U65
    target = own_targets(nets, batch, next_policy, None, alpha, args.gamma)  # without ε: D100; α, U102
    with torch.no_grad():  # n of π(s), n of π(s')
        of_both = torch.stack([mean, next_mean], 1).repeat_interleave(n, 1)
        sampled, sampled_log_prob = boxed(of_both, log_std, normal[:, : 2 * n])
        log_uniform = torch.full((rows, n), -act_dim * math.log(2), device=sampled.device)
        log_probs = torch.cat([log_uniform, sampled_log_prob], 1)
    q = q_of_many(nets["qf"], batch.obs, torch.cat([batch.actions[:, None], uniform, sampled], 1))
    td_loss = (q[..., 0] - target).square().mean(1).sum()  # one MSE per critic: D2
    gap, _ = conservative_gap(q[..., 1:], q[..., 0], log_probs, None, -math.inf)
    cql_loss = args.cql_weight * gap.mean(1).sum()  # [CQL Eq. 4]
    new_actions, log_pi = boxed(mean, log_std, normal[:, 3 * n])
    missing = log_pi.detach() - act_dim  # of the target entropy, -A
    alpha_loss = -(log_alpha * missing).mean()  # [SAC, arXiv 1812.05905 §5]
    q_new = frozen_q(nets["qf"], batch.obs, new_actions).amin(0)  # of all critics: D101
    actor_loss = (alpha * log_pi - q_new).mean()  # [SAC §4.2]: for Eq. 5, U63
    logs = {"loss/q": td_loss, "loss/actor": actor_loss, "loss/alpha": alpha_loss, "cql/gap": gap.mean()}
    logs |= {"q/mean": q[..., 0].mean(), "q/spread": q[..., 0].std(0, correction=0).mean()}
    logs |= {"policy/log_prob": log_pi.mean(), "alpha/entropy": log_alpha.exp()}
    logs |= {"policy/outside": (mean.abs() - 1).relu().mean(), "log_std/mean": log_std.mean()}
    return td_loss + cql_loss + alpha_loss + actor_loss, {k: v.detach() for k, v in logs.items()}


def dual_actor_losses(
    nets: nn.ModuleDict, obs: torch.Tensor, noise: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Online: E[α log π - min over all critics of Q_k], α fixed, and its logs.  [SO2]: for Eq. 5, U63"""
    mean, log_std = nets["actor"](obs)
    actions, log_pi = boxed(mean, log_std, noise)
    loss = (alpha * log_pi - frozen_q(nets["qf"], obs, actions).amin(0)).mean()
    logs = {"loss/actor": loss, "policy/log_prob": log_pi.mean()}
    logs |= {"policy/outside": (mean.abs() - 1).relu().mean(), "log_std/mean": log_std.mean()}
    return loss, {k: v.detach() for k, v in logs.items()}


# --- shared: so2.replay ---
def make_so2_optimizer(
    nets: nn.ModuleDict, policy_lr: float, critic_lr: float, device: torch.device
) -> torch.optim.Adam:
    """Adam over actor and α at one rate, critics at the other; a step passes over what has no gradient."""
    policy = {"params": [*nets["actor"].parameters(), nets["weights"]["log_alpha"]], "lr": policy_lr}
    critic = {"params": [*nets["qf"].parameters()], "lr": critic_lr}
    return torch.optim.Adam([policy, critic], fused=True, capturable=device.type == "cuda")


# balanced replay
class Ratio(nn.Module):
    """log w(s, a) of own rows to the dataset's: obs (B, O), actions (B, A) -> (B,); 0 at first: D102"""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        first, second = nn.Linear(obs_dim + act_dim, hidden), nn.Linear(hidden, hidden)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, actions], -1)).squeeze(-1)


def ratio_losses(
    ratio: nn.Module, own: Batch, dataset: Batch, batch: Batch, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of w on rows of either kind (N,), new priorities (B,) of the rows of `batch`, logs.  [OFF2ON's code]

    E_off[-ln 2/(w+1)] - E_on[ln 2w/(w+1)] = E_off[softplus(l)] + E_on[softplus(-l)] - 2 ln 2, l = log w; the constant
    is left out. Priority w^(1/T) / E_off[w^(1/T)], within [1e-3, 1e3].
    """
    log_w_own, log_w_dataset = ratio(own.obs, own.actions), ratio(dataset.obs, dataset.actions)
    loss = F.softplus(log_w_dataset).mean() + F.softplus(-log_w_own).mean()
    with torch.no_grad():
        tempered = (ratio(batch.obs, batch.actions) / temperature).exp()
        priorities = (tempered / (log_w_dataset / temperature).exp().mean()).clamp(1e-3, 1e3)
    logs = {"loss/ratio": loss.detach(), "replay/w_dataset": log_w_dataset.detach().exp().mean()}
    return loss, priorities, logs


class Priorities(nn.Module):
    """Priorities of the rows of a buffer, and draws in proportion to them, all on the device.

    A sum tree of two levels: `of_rows` in blocks of 128, and `of_blocks`, the sum of each. A draw takes the cumulative
    sum of the blocks, finds n points in it, and does the same within the blocks found: N / 128 + 128 n additions.
    """

    WIDTH = 128

    def __init__(self, capacity: int, n_dataset: int):
        super().__init__()
        of_rows = torch.zeros(-(-capacity // self.WIDTH), self.WIDTH)
        of_rows.view(-1)[:n_dataset] = 1.0
        self.register_buffer("of_rows", of_rows)
        self.register_buffer("of_blocks", of_rows.sum(1, dtype=torch.float64))

    def draw(self, n: int) -> torch.Tensor:
        """Indices (n,), one from each n-th of the total.  [OFF2ON's code]"""
        device = self.of_blocks.device
        points = (torch.arange(n, device=device) + torch.rand(n, dtype=torch.float64, device=device)) / n
        ends = self.of_blocks.cumsum(0)
        block, left = self._find(ends[None], (points * ends[-1])[None])
        block, left = block[0], left[0]
        ends = self.of_rows[block].cumsum(1, dtype=torch.float64)
        column, _ = self._find(ends, left[:, None])
        return block * self.WIDTH + column[:, 0]

    @staticmethod
    def _find(ends: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per row of `ends` (R, M), cumulative sums: which interval each point (R, P) is in, and how far: (R, P) both.

        An interval without length holds no point: below the total, whatever was rounded, the first end above a point
        is above the end before it.
        """
        points = points.minimum(ends[:, -1:] * (1 - 1e-12)).clamp(min=0.0)
        index = torch.searchsorted(ends, points, right=True)
        before = ends.gather(1, (index - 1).clamp(min=0)) * (index > 0)
        return index, points - before

    def assign(self, index: torch.Tensor, priorities: torch.Tensor) -> None:
        """New priorities (n,) of the rows at `index` (n,); what occurs twice has the same twice."""
        self.of_rows.view(-1)[index] = priorities
        block = index // self.WIDTH
        self.of_blocks[block] = self.of_rows[block].sum(1, dtype=torch.float64)

    def enter(self, row: int, priority: float) -> None:
        """The priority of a row that is new."""
        block, column = divmod(row, self.WIDTH)
        self.of_rows[block, column] = priority
        self.of_blocks[block] = self.of_rows[block].sum(dtype=torch.float64)


def first_priority(own_frac: float, n_dataset: int, n_own: int) -> float:
    """Of an own row: n_own such are a share own_frac of the total with the dataset's, which begin at 1.  [OFF2ON]"""
    return own_frac * n_dataset / ((1 - own_frac) * n_own)


def draw_own(replay: ReplayBuffer, n: int) -> torch.Tensor:
    """Indices (n,) of own rows, which come after the dataset's."""
    return replay.draw(n, replay.size - replay.fixed) + replay.fixed


class Balance:
    """Balanced replay: the density ratio with its optimizer, and the priorities."""

    def __init__(self, replay: ReplayBuffer, obs_dim: int, act_dim: int, args: Args, device: torch.device):
        self.replay, self.args = replay, args
        self.ratio = Ratio(obs_dim, act_dim, args.ratio_hidden).to(device)
        capturable = device.type == "cuda"
        self.opt = torch.optim.Adam(self.ratio.parameters(), args.ratio_lr, fused=True, capturable=capturable)
        self.priorities = Priorities(len(replay.table), replay.fixed).to(device)
        self.first = first_priority(args.own_frac, replay.fixed, max(args.warmup_steps, 1))  # D104

    def enter(self) -> None:
        """Take in the row added last."""
        self.priorities.enter(self.replay.rows - 1, self.first)

    def draw(self, of_ratio: Callable) -> tuple[torch.Tensor, Batch, dict[str, torch.Tensor]]:
        """Indices of a batch, the batch and logs; then one step of the ratio, and the batch's new priorities.  [OFF2ON]

        of_ratio is ratio_losses, compiled or not.
        """
        args, replay = self.args, self.replay
        index = self.priorities.draw(args.batch_size)
        batch = replay.take(index)
        own = replay.take(draw_own(replay, args.ratio_batch))
        dataset = replay.take(torch.randint(replay.fixed, (args.ratio_batch,), device=index.device))
        loss, priorities, logs = of_ratio(self.ratio, own, dataset, batch, args.ratio_temperature)
        learn(self.opt, loss)
        self.priorities.assign(index, priorities)
        return index, batch, logs


def draw_plain(replay: ReplayBuffer, args: Args) -> tuple[torch.Tensor, Batch, dict[str, torch.Tensor]]:
    """As Balance.draw, for SO2 alone: batch_size own rows, and mixed_rows of the dataset's and own ones.  [SO2]"""
    index = torch.cat([draw_own(replay, args.batch_size), replay.draw(args.mixed_rows)])
    return index, replay.take(index), {}


# --- end shared: so2.replay ---


# --- shared: wsrl.step ---
def learn(opt: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One gradient step of the parameters that the loss depends on."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()


def follow(nets: nn.ModuleDict, polyak: float) -> None:
    """The target update."""
    with torch.no_grad():
        torch._foreach_lerp_([*nets["q_target"].parameters()], [*nets["qf"].parameters()], polyak)


# --- end shared: wsrl.step ---


def update(
    nets: nn.ModuleDict,
    opt: torch.optim.Optimizer,
    draw: Callable[[], tuple],
    n_dataset: int,
    of_values: Callable,
    of_actor: Callable,
    args: Args,
) -> dict[str, torch.Tensor]:
    """Online: utd steps of critics and targets, each on a batch of its own, then one of the actor on the last.  [SO2]

    draw() gives indices, batch and logs; of_values and of_actor are value_losses and dual_actor_losses, compiled or
    not. Nothing in here waits for the GPU.
    """
    for _ in range(args.utd):
        index, batch, logs = draw()
        rows, act_dim = batch.actions.shape
        perturbation = None
        if args.perturbation:  # behind the box: U140
            perturbation = draw_perturbation(rows, act_dim, args, index.device)
        # NEW; where gradients are, so that --latent sample draws: U54
        next_policy = boxed(*nets["actor"](batch.next_obs), torch.randn_like(batch.actions))
        target = own_targets(nets, batch, next_policy, perturbation, args.entropy_weight, args.gamma)
        loss, value_logs = of_values(nets, batch, target)
        learn(opt, loss)
        follow(nets, args.polyak)
    loss, actor_logs = of_actor(nets, batch.obs, torch.randn_like(batch.actions), args.entropy_weight)
    learn(opt, loss)
    own_share = (index >= n_dataset).float().mean()
    return logs | value_logs | actor_logs | {"replay/own_share": own_share}


def train(args: Args) -> dict[str, float]:
    task = data.get_task(args.env)
    if args.time_acting:  # NEW
        return judge.time_acting(args, task, untrained_explorer)
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    halvings(args)  # NEW: refuses what cannot be
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    units = data.Units(moments=dataset.moments() if args.normalize_obs else None)
    replay = dataset.buffer(units, r.device, args.online_steps)  # own rows come after the dataset's
    interaction = data.Interaction(data.make_env(task, units), replay, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    windows = Windows(replay, dataset.ends, args.horizon, args.normalize_windows)  # NEW
    planner = Planner(r, args, windows, task.act_dim, dataset.sha256)
    nets = make_so2_dual_nets(planner.net, args, task.obs_dim, task.act_dim).to(r.device)
    opt = make_so2_optimizer(nets, args.policy_lr, args.critic_lr, r.device)
    online_opt = make_so2_optimizer(nets, args.policy_lr_online, args.critic_lr_online, r.device)  # U102
    explorer = Explorer(args, nets["actor"], nets["transition"], windows)  # NEW
    balance, balanced = None, {}
    if args.balanced_replay:
        balance = Balance(replay, task.obs_dim, task.act_dim, args, r.device)
        balanced = dict(ratio=balance.ratio, ratio_opt=balance.opt, priorities=balance.priorities)

    @torch.no_grad()
    def act(obs: torch.Tensor, actor: nn.Module = nets["actor"]) -> torch.Tensor:  # deterministic
        return box(actor(obs)[0])[0]  # μ of W itself, no noise: U54

    def explore(obs: torch.Tensor) -> torch.Tensor:
        return box(explorer.act(obs))[0]  # NEW: both kinds of doubt act before the box: U63

    def score(actor: nn.Module) -> float:  # NEW
        return evaluate(partial(act, actor=actor), r.device)["eval/score"]

    added = balanced | planner.state() | explorer.state()
    r.register(nets=nets, opt=opt, online_opt=online_opt, replay=replay, interaction=interaction, **added)
    compiled_losses, of_ratio = r.compiled(losses), r.compiled(ratio_losses)
    of_values, of_policy = r.compiled(value_losses), r.compiled(dual_actor_losses)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    def with_planner(loss: torch.Tensor, logs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
        if args.bc_coef > 0:  # NEW [Eq. 3]: the planner's loss for the actor, off: U61
            bc = planner.planner_loss(nets["actor"].net, *windows.draw(args.batch_size))
            loss, logs = loss + args.bc_coef * bc, logs | {"loss/bc": bc.detach()}
        return loss, logs

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        batch = replay.sample(args.batch_size)
        noise = draw_noise(args.batch_size, task.act_dim, args.cql_n_actions, r.device)
        loss, logs = with_planner(*compiled_losses(nets, batch, noise, args))
        learn(opt, loss)
        follow(nets, args.polyak)
        return logs

    if args.from_offline and r.once("from_offline"):
        r.import_phase("offline", args.from_offline, offline_settings, nets=nets)
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
        r.export_phase("offline", offline_settings, nets=nets)
        evaluate.export(act, r)

    # NEW: the posterior [Alg. 1, l. 9]
    weigh = partial(posterior_weight, nets)
    if r.once("posterior"):
        r.seed("posterior")
        r.record(args.offline_steps, explorer.start(replay, weigh))

    # online: one environment step, then utd steps of the critics and one of the actor
    def draw() -> tuple[torch.Tensor, Batch, dict[str, torch.Tensor]]:
        return draw_plain(replay, args) if balance is None else balance.draw(of_ratio)

    def of_actor(*inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # NEW
        return with_planner(*of_policy(*inputs))

    def online_step() -> dict[str, torch.Tensor]:
        return update(nets, online_opt, draw, replay.fixed, of_values, of_actor, args)

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if interaction.obs is None:  # NEW: an episode's first step has no shift: U57
            explorer.shift.zero_()
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
        explorer.observe(replay)  # NEW
        if balance is not None:
            balance.enter()
        if step >= args.warmup_steps:  # before, the pre-trained policy collects [SO2]
            r.log(step, step_fn() | judge.acting(explorer))
        if (step + 1) % run.LOG_EVERY == 0:  # NEW
            explorer.tally.zero_()
        if args.uq == "laplace" and (step + 1) % args.laplace_every == 0:  # NEW: uniform rows, U142
            r.record(step + 1, judge.error_rank(explorer, replay) | explorer.fit([replay], weigh))
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act, r.device))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
