"""DARE on Cal-QL: penalise Q per sample, where an action is near an energy-guided behavior model's.

Paper    "DARE: Dynamic Alignment for RElease", ICLR 2026 submission (later arXiv 2511.03828v2): Eq., Table, App. below
         are its. CEP, the guidance: Lu et al., ICML 2023, arXiv 2304.12824; SfBC, the behavior model's network: Chen et
         al., ICLR 2023, arXiv 2209.14548. Backbone: calql.py, line for line outside NEW.
Idea     Each row of an online batch is scored by its action's distance to a reference action of a behavior model
         guided by Q; a threshold between the scores of dataset and own rows exchanges those on its wrong sides, at most
         n pairs; rows that end up offline-like keep Cal-QL's regulariser, the others have the TD loss alone. Theorem 1
         fails: the halves move apart, as scores {1, 4} | {2, 5} to {1, 2} | {4, 5}.
Symbols  ν behavior | ε̂ noise estimate | f_φ energy | s guidance_scale | π_0 ∝ ν e^{s f} | â reference, drawn from π_0 |
         d score | τ threshold | β energy_beta | K support_k | M exchanged pairs | n exchange_cap |
         b'_off, b'_on off_like, ~off_like | R the regulariser
Read     calql.py; then NEW: scores, exchange, threshold, weight; behavior model, sampler, energy, Guide; then train
Notes    As in calql.py: D1 one backward, D2 no half before the TD loss (as in Eq. 14, not Eq. 1), D3 no calibration
         online, D4 warm-up, D5 log π of the data's actions, D6 small last gain, D7 the file's episode ends, U1 mini,
         U2 cut returns start from 0, U3 optimizers go on.
         D10 paper: KL(a || â) (Eq. 7), 0 or infinite; here: of Gaussians around them, `gauss` ½ |a - â|² (scale has no
            effect), `gauss_std` with the policy's spread: 99 % of mini's rows split alike on IQL, 60 % on Cal-QL, where
            coordinates near ±1 rule. Softmax, kernel-density, ELBO readings fit what the papers print as well.
         D11 paper: e^{-f} in Eq. 34, + ∇f in Eq. 6, together downhill; here: e^{+f}, as CEP's code.
         D12 CEP: samples unbounded; here: clamped to the action box; because they meet data and Q, which end there.
         D13 paper: Eq. 9's two roots; here: the one between the means, without dividing by σ²_on - σ²_off (float32).
         U10 Q in f_φ's labels: min of the target twins.
         U11 its unit: that of CEP's code (QGPO), which β = 3 is from: r · 1000 / return range; r in AntMaze.
         U12 when f_φ learns: energy_steps on the offline Q, then with every gradient step, on its batch.
         U13 K, β, behavior schedule, sampler: CEP's. It narrows peaks (spread 0.3 to 0.24; DPM-Solver++ 2M, 10 steps in
            log-SNR: 0.31), but 91 % of mini's rows are split as with 2M; as with other noise: 68 %.
         U14 support of own rows: every support_every steps; until then they are left out of f_φ's loss.
         U15 D4RL's tasks without a row in the tables: s = 3, the rest as in locomotion (large mazes: AntMaze); Minari,
            Reacher: s = 8. f_φ learns little in the minis' sizes, but references follow it: on seed 100 their Q is 4.0
            above the data's on Reacher (s = 0: 1.3), 2.2 on Hopper (-0.1). With --energy-lr 3e-3 it is 6.1 at s = 3,
            -10.5 at 8; 3.1 on Hopper. n stays 32 there, of 64 rows.
         U17 the "top" M: largest d offline against smallest d online.
         U18 spreads: of the population, at least 1e-6 of the pooled one.
         U22 mean of R: over the batch, a row keeps its weight; --cql-reduction subset: over the offline-like rows.
         U23 Lagrange variant: α' follows the gap of the offline-like rows only.
         U24 losses of actor and temperature: on all rows, as in Cal-QL.
         U25 R online: uncalibrated (D3), exchanged own rows need no return; with --calibrate-online they have theirs.
Metrics  those of calql.py, cql/gap over all rows; split/exchanged M;
         split/tau; split/root_valid: the fits cross between the means, else midpoint; split/gap, split/gap_after of
         mean d, on minus off, below 0: own rows are nearer; ref/q_gain_off, ref/q_gain_on, Q of references less rows';
         ref/q_std; split/off_std, split/on_std; energy/loss; energy/label_entropy, near 0: one-hot labels, weak
         guidance; energy/std_bq; ref/clip_frac of reference coordinates at the box; loss/behavior.
Run      python algorithms/calql_dare.py --env hopper-medium-v2 --seed 0
         n = 16, no cap: --exchange-cap 16, -1 | losses by origin --exchange-cap 0 | no energy --guidance-scale 0 |
         direct exchange --threshold sort --exchange-cap -1
         --from-offline runs/calql/hopper-medium-v2/seed0: the papers' common start | --from-behavior RUN: its model
Cost     reacher-mini-v0 from an offline phase: 3.4 CPU minutes; published sizes want a GPU (not measured there).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import data, run
from common.buffer import Batch, ReplayBuffer, mix

# ranges in Args: Natural, Count, Several are integers from 0, 1, 2; Number any, Positive > 0, Weight >= 0; of the
# fractions Share has both 0 and 1, Portion 0, Rate 1
from common.run import Count, Natural, Number, Portion, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [DARE §7.1]
    online_steps: Natural = 200_000  # environment steps [DARE §7.1]
    from_offline: Path | None = None  # run directory (or its offline.pt) to take the offline phase from
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it works
    compile: bool | None = None  # compile and capture the gradient step; default: on for cuda, off for cpu
    out_dir: Path = Path("runs")  # the run lives in <out-dir>/<file>/<env>/seed<seed>
    overwrite: bool = False  # start anew instead of resuming
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to the run directory, for TensorBoard
    eval_every: Count = 5_000  # steps of the running phase [DARE averages the last 4; period: CORL]
    eval_episodes: Count = 10  # episodes of an evaluation [PEX, CORL]
    # Cal-QL
    batch_size: Several = 256  # transitions [DARE Table 4]
    gamma: Share = 0.99  # discount [DARE Table 4]
    polyak: Rate = 0.005  # share of qf copied into q_target at every gradient step [DARE Table 4]
    policy_lr: Positive = 1e-4  # Adam, actor and entropy weight [DARE Table 4]
    critic_lr: Positive = 3e-4  # Adam, critics and Lagrange multiplier [DARE Table 4]
    hidden: Count = 256  # width of the hidden layers [DARE Table 4]
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
    # NEW: behavior model
    from_behavior: Path | None = None  # run directory (or its behavior.pt) to take the behavior model from
    guidance_scale: Weight = 8.0  # s [Table 7]; 0 = no energy
    behavior_steps: Natural = 600_000  # gradient steps [B.5]
    behavior_batch: Count = 4_096  # [B.5]
    behavior_lr: Positive = 1e-4  # Adam [B.5]
    behavior_width: Annotated[int, "[4, inf)"] = 512  # of the widest block [SfBC]
    # NEW: energy
    energy_steps: Natural = 100_000  # steps of f_φ before going online: U12
    energy_batch: Count = 256  # states [B.5]
    energy_lr: Positive = 3e-4  # Adam [B.5]
    energy_hidden: Count = 256  # width of the four hidden layers [B.5]
    energy_beta: Weight = 3.0  # β [CEP]: U13
    energy_units: Literal["qgpo", "reward"] = "qgpo"  # unit of Q in the labels: U11
    support_k: Several = 16  # K, support actions per state [CEP]: U13
    support_every: Count = 250  # environment steps between support generations for online rows: U14
    # NEW: split and losses
    score: Literal["gauss", "gauss_std"] = "gauss"  # measure of d [Eq. 7]: D10
    threshold: Literal["gauss", "sort"] = "gauss"  # Eqs. 8-9, or the pooled quantile: direct exchange [§7.5]
    exchange_cap: Annotated[int, "[-1, inf)"] = 32  # most pairs exchanged, n [Eq. 10; B.1]; -1 all, 0 none
    cql_reduction: Literal["batch", "subset"] = "batch"  # rows that R is averaged over: U22


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(  # [DARE Table 4; episodes: CORL]
        critic_layers=5, cql_weight=5.0, cql_weight_online=5.0, lagrange=True, max_target_backup=True,
        normalize_obs=False, reward_scale=10.0, reward_bias=-5.0, sparse_reward=True, target_gap=0.8,
        eval_every=10_000, eval_episodes=100, guidance_scale=3.0, support_k=32, energy_units="reward",
    ),
    **{k: dict(cql_weight=1.0, cql_weight_online=1.0, max_target_backup=True, normalize_obs=False,
               guidance_scale=3.0)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [CORL, fine-tuning]; U15
    "maze2d-": dict(  # [CORL, offline CQL]; U15
        policy_lr=3e-5, lagrange=True, target_gap=5.0, eval_episodes=100, guidance_scale=3.0,
    ),
    "hopper-": dict(guidance_scale=3.0),  # no row in the tables, as the next two: U15
    "halfcheetah-": dict(guidance_scale=3.0),
    "walker2d-": dict(guidance_scale=3.0),
    "hopper-medium-v2": dict(guidance_scale=8.0),  # this and the rest: [Table 7]
    "hopper-medium-replay-v2": dict(guidance_scale=3.0),
    "hopper-medium-expert-v2": dict(guidance_scale=2.0),
    "halfcheetah-medium-v2": dict(guidance_scale=10.0),
    "halfcheetah-medium-replay-v2": dict(guidance_scale=8.0),
    "halfcheetah-medium-expert-v2": dict(guidance_scale=3.0),
    "walker2d-medium-v2": dict(guidance_scale=10.0),
    "walker2d-medium-replay-v2": dict(guidance_scale=5.0),
    "walker2d-medium-expert-v2": dict(guidance_scale=5.0),
    "antmaze-umaze-diverse-v2": dict(guidance_scale=1.0),
    "antmaze-medium-play-v2": dict(guidance_scale=4.0),
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, cql_weight=5.0, cql_weight_online=5.0,
        behavior_steps=3_000, behavior_batch=512, behavior_lr=1e-3, behavior_width=64,
        energy_steps=1_000, energy_hidden=32, support_k=4,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50, cql_weight_online=1.0),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "policy_lr", "critic_lr", "hidden", "critic_layers",
    "cql_weight", "cql_n_actions", "cql_clip_min", "calibrate", "lagrange", "target_gap", "max_target_backup",
    "normalize_obs", "reward_scale", "reward_bias", "sparse_reward",
)  # fmt: skip
BEHAVIOR_SETTINGS = (  # NEW: what a behavior model depends on, beside the dataset and the code
    "behavior_steps", "behavior_batch", "behavior_lr", "behavior_width", "normalize_obs",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "lagrange": ("target_gap",),
    "calibrate": ("sparse_reward",),
    "exchange_cap != 0": (
        "from_behavior", "behavior_steps", "behavior_batch", "behavior_lr", "behavior_width", "guidance_scale",
        "score", "threshold",
    ),
    "exchange_cap != 0 and guidance_scale > 0": (
        "energy_steps", "energy_batch", "energy_lr", "energy_hidden", "energy_beta", "energy_units", "support_k",
        "support_every",
    ),
}  # fmt: skip


# NEW: the method, down to the blocks of calql.py. First the split of a batch: scores, threshold, exchange.
# --- shared: iql_dare.exchange ---
Logs = dict[str, torch.Tensor]  # metric -> detached 0-d tensor


def alignment(kind: str, actions: torch.Tensor, refs: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """d of each row, higher = less aligned: its action a and reference â, each (N, A) -> (N,).  [DARE Eq. 7]

    KL(N(a, σ²) || N(â, σ²)), as that of two points is 0 or infinite: D10. kind "gauss": σ = 1, half the squared
    distance; "gauss_std": σ the policy's, log_std (A,) or (N, A).
    """
    gap = actions - refs
    if kind == "gauss_std":
        gap = gap * (-log_std).exp()
    return 0.5 * gap.square().sum(-1)


def exchange(
    scores: torch.Tensor, off: torch.Tensor, tau: torch.Tensor | int, cap: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Swap the top-M pairs: scores (N,), off (N,) bool by origin, τ () -> off_like (N,) bool, M ().  [DARE Eq. 10]

    Candidates are dataset rows with d >= τ and own rows with d < τ; M = min(both counts, cap), cap < 0 being no cap.
    The largest d leave, the smallest enter: U17. Rows stay and labels change: fixed shapes, nothing is read back.
    """
    high, low = off & (scores >= tau), ~off & (scores < tau)
    m = torch.minimum(high.sum(), low.sum()).clamp(max=len(scores) if cap < 0 else cap)
    # ranks from 0; rows that are no candidates come last
    rank_high = torch.where(high, -scores, torch.inf).argsort().argsort()
    rank_low = torch.where(low, scores, torch.inf).argsort().argsort()
    leaving, entering = high & (rank_high < m), low & (rank_low < m)
    return (off & ~leaving) | entering, m


def gaps(scores: torch.Tensor, off: torch.Tensor, off_like: torch.Tensor) -> Logs:
    """Mean d of the online half less that of the offline one, before the exchange and after: (N,), (N,) bool twice."""

    def gap(is_off: torch.Tensor) -> torch.Tensor:  # without a shape that depends on data
        share = is_off.to(scores)
        mean_off = (share * scores).sum() / share.sum()
        return ((1 - share) * scores).sum() / (1 - share).sum() - mean_off

    return {"split/gap": gap(off), "split/gap_after": gap(off_like)}


def sorted_exchange(
    scores: torch.Tensor, off: torch.Tensor, n_offline: int, cap: int
) -> tuple[torch.Tensor, Logs]:
    """The n_offline lowest scores become offline-like, by at most `cap` swaps: (N,), off (N,) bool -> off_like (N,).

    The sort of StratDiff [§3.2, App. F], which DARE compares with [DARE §7.5], as the exchange at the pooled quantile:
    τ = n_offline, of ranks in place of scores, so that ties do not matter.
    """
    order = scores.argsort(stable=True)
    rank = order.argsort()
    off_like, m = exchange(rank.to(scores), off, n_offline, cap)
    logs = {"split/tau": scores[order][n_offline], "split/exchanged": m}
    return off_like, logs | gaps(scores, off, off_like)


# --- end shared: iql_dare.exchange ---


# --- shared: iql_dare.threshold ---
def gaussian_threshold(off: torch.Tensor, on: torch.Tensor) -> tuple[torch.Tensor, Logs]:
    """τ where the Gaussians fitted to two score samples cross between their means, else the midpoint.  [Eqs. 8-9]

    off, on (N,) -> (). With v = σ², Δ = μ_on - μ_off, L = ln(σ_on / σ_off), Eq. 9 is a x² + 2 b x + c = 0 in
    x = τ - μ_off, where a = v_on - v_off, b = v_off Δ, c = -v_off (Δ² + 2 v_on L). The densities' ratio is monotone
    between the means, so that at most one root is there: -c / (b + sign(Δ) √(b² - a c)), also for a = 0: D13.
    """
    floor = 1e-6 * torch.cat([off, on]).std(correction=0) + 1e-30  # for halves without spread: U18
    mu_off, mu_on = off.mean(), on.mean()
    std_off, std_on = (torch.maximum(x.std(correction=0), floor) for x in (off, on))
    v_off, v_on, gap, log_ratio = std_off.square(), std_on.square(), mu_on - mu_off, (std_on / std_off).log()
    root = (gap.square() + 2 * (v_on - v_off) * log_ratio).clamp(min=0).sqrt()  # √(b² - a c) / (σ_off σ_on)
    denominator = v_off * gap + gap.sign() * std_off * std_on * root
    x = v_off * (gap.square() + 2 * v_on * log_ratio) / denominator
    # equal means: x is infinite or NaN, and not valid
    valid = (x * gap.sign() > 0) & (x * gap.sign() < gap.abs())
    tau = torch.where(valid, mu_off + x, 0.5 * (mu_off + mu_on))
    logs = {"split/root_valid": valid, "split/tau": tau}
    return tau, logs | {"split/off_std": std_off, "split/on_std": std_on}


def split(scores: torch.Tensor, off: torch.Tensor, args: Args) -> tuple[torch.Tensor, Logs]:
    """Threshold, then exchange [Alg. 1, l. 7-8]: scores (B,), off (B,) bool, dataset rows first -> off_like (B,)."""
    n_offline = round(args.offline_frac * args.batch_size)
    tau, logs = gaussian_threshold(scores[:n_offline], scores[n_offline:])
    if args.threshold == "sort":  # direct exchange [§7.5]
        off_like, more = sorted_exchange(scores, off, n_offline, args.exchange_cap)
        return off_like, logs | more
    off_like, m = exchange(scores, off, tau, args.exchange_cap)
    return off_like, logs | {"split/exchanged": m} | gaps(scores, off, off_like)


# --- end shared: iql_dare.threshold ---


# NEW: the losses are calql.py's with a weight per row: α' follows the rows that have one: U23, actor and temperature
# all rows: U24; no Monte-Carlo bound, unless --calibrate-online: U25
# --- shared: calql_dare.release ---
def squashed_log_std(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log spread of tanh N(mean, σ²) near its centre: log σ + log(1 - tanh² mean), (B, A); for gauss_std: D10."""
    return log_std + 2 * (math.log(2) - mean - F.softplus(-2 * mean))


def released_weight(off_like: torch.Tensor, args: Args) -> torch.Tensor:
    """α_cql of each row: as in Cal-QL where off_like (B,) bool, 0 elsewhere; (B,).  [DARE Eq. 14, StratDiff Eq. 11]

    The losses average over all rows of the batch; "subset" over the offline-like ones, whose number is fixed: U22.
    """
    n_offline = round(args.offline_frac * args.batch_size)
    scale = args.batch_size / n_offline if args.cql_reduction == "subset" else 1.0
    return args.cql_weight_online * scale * off_like


# --- end shared: calql_dare.release ---


# NEW: what the scores are distances to, samples of π_0(a|s) ∝ ν(a|s) e^{s f(s, a)}. ν is a diffusion over actions:
# a_t = α_t a + σ_t ε from t = 0, the action, to t = 1, noise. First its network.
# --- shared: iql_dare.guidance ---
T_MIN = 1e-3  # smallest diffusion time [CEP]


def log_alpha(t):
    """log α_t of the VP-SDE whose noise rate grows linearly from 0.1 to 20; t a number or a tensor.  [CEP]"""
    return -0.25 * t * t * (20.0 - 0.1) - 0.5 * t * 0.1


def noise_levels(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """α_t, σ_t = √(1 - α_t²), in the shape of t."""
    return log_alpha(t).exp(), (-torch.expm1(2 * log_alpha(t))).sqrt()


class FourierTime(nn.Module):
    """t (...,) -> (..., 32): sines and cosines at fixed frequencies drawn from N(0, 30²), a linear layer.  [SfBC]"""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 30.0 * torch.randn(16))
        self.linear = nn.Linear(32, 32)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = 2 * math.pi * t[..., None] * self.frequencies
        return self.linear(torch.cat([angles.sin(), angles.cos()], -1))


class ResidualBlock(nn.Module):
    """x (B, width_in), SiLU of the embedding of time and state e (B, 128) -> (B, width).  [SfBC]"""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.first, self.cond = nn.Linear(width_in, width), nn.Linear(128, width)
        self.second = nn.Linear(width, width)
        self.skip = nn.Linear(width_in, width) if width_in != width else nn.Identity()

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.first(x)) + self.cond(e)
        return F.silu(self.second(h)) + self.skip(x)


class BehaviorNet(nn.Module):
    """ε̂(a_t, t | s), U-Net-like with dense layers: a_t (B, A), t (B,) or (1,), obs (B, O) -> (B, A).  [SfBC; DARE B.5]

    The state enters through the embedding only, like a class.
    """

    def __init__(self, obs_dim: int, act_dim: int, width: int):
        super().__init__()
        self.time, self.state = FourierTime(), nn.Linear(obs_dim, 32)
        self.embed = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128))
        w, half, quarter = width, width // 2, width // 4
        self.down1, self.down2 = ResidualBlock(act_dim, w), ResidualBlock(w, half)
        self.down3, self.middle = ResidualBlock(half, quarter), ResidualBlock(quarter, quarter)
        self.up3, self.up2 = ResidualBlock(2 * quarter, half), ResidualBlock(2 * half, w)
        self.out = nn.Linear(2 * w, act_dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        e = self.embed(torch.cat([F.silu(self.state(obs)), self.time(t).expand(len(obs), -1)], -1))
        e = F.silu(e)  # once for all blocks
        d1 = self.down1(x, e)
        d2 = self.down2(d1, e)
        d3 = self.down3(d2, e)
        u3 = self.up3(torch.cat([d3, self.middle(d3, e)], -1), e)
        u2 = self.up2(torch.cat([d2, u3], -1), e)
        return self.out(torch.cat([d1, u2], -1))


def behavior_loss(behavior: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """E Σ_A (ε̂(α_t a + σ_t ε, t | s) - ε)², t ~ U[1e-3, 1]: obs (B, O), actions (B, A) -> ().  [SfBC; DARE B.5]"""
    t = T_MIN + (1 - T_MIN) * torch.rand(len(obs), device=obs.device)
    alpha, sigma = (x[:, None] for x in noise_levels(t))
    noise = torch.randn_like(actions)
    return (behavior(alpha * actions + sigma * noise, t, obs) - noise).square().sum(-1).mean()


# Sampling: DPM-Solver++, second order, singlestep (Lu et al. 2022, arXiv 2211.01095). Times are Python numbers here.
EpsFn = Callable[[torch.Tensor, float], torch.Tensor]  # a_t (B, A), t -> ε̂ (B, A)


def levels(t: float) -> tuple[float, float]:
    """noise_levels of one time, as numbers: constants of a captured step."""
    return math.exp(log_alpha(t)), math.sqrt(-math.expm1(2 * log_alpha(t)))


def half_log_snr(t: float) -> float:
    """λ_t = log α_t - log σ_t."""
    alpha, sigma = levels(t)
    return math.log(alpha / sigma)


def denoise(eps_fn: EpsFn, x: torch.Tensor, t: float) -> torch.Tensor:
    """Estimate of the clean action, (x - σ_t ε̂) / α_t."""
    alpha, sigma = levels(t)
    return (x - sigma * eps_fn(x, t)) / alpha


def solver_step(x: torch.Tensor, denoised: torch.Tensor, t: float, to: float) -> torch.Tensor:
    """x (B, A) from time t to an earlier one, along a constant x̂: (σ_to / σ_t) x - α_to (e^{λ_t - λ_to} - 1) x̂."""
    (_, sigma), (alpha_to, sigma_to) = levels(t), levels(to)
    return (sigma_to / sigma) * x - alpha_to * math.expm1(half_log_snr(t) - half_log_snr(to)) * denoised


def sample_actions(eps_fn: EpsFn, x: torch.Tensor) -> torch.Tensor:
    """x ~ N(0, I) (B, A) -> actions (B, A), not clamped; CEP's: 15 evaluations at times uniform in [1e-3, 1].  U13

    Seven steps of second order, each over two intervals of the grid, then one of first order.
    """
    grid = [1.0 + i / 15 * (T_MIN - 1.0) for i in range(16)]
    for t, mid, to in zip(grid[0:13:2], grid[1:14:2], grid[2:15:2], strict=True):
        d = denoise(eps_fn, x, t)
        r = (half_log_snr(mid) - half_log_snr(t)) / (half_log_snr(to) - half_log_snr(t))
        d_mid = denoise(eps_fn, solver_step(x, d, t, mid), mid)
        x = solver_step(x, d + (d_mid - d) / (2 * r), t, to)
    return solver_step(x, denoise(eps_fn, x, grid[14]), grid[14], grid[15])


# The energy f_φ(s, a_t, t), which learns by contrast between actions of one state [CEP], and what it does to ε̂
class EnergyNet(nn.Module):
    """f(s, a_t, t), higher is better: D11; obs (..., O), a_t (..., A), t (...,) or (1,) -> (...,).  [DARE B.5]"""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.time, sizes = FourierTime(), (act_dim + 32 + obs_dim, hidden, hidden, hidden, hidden)
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, obs: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([x, self.time(t).expand(*x.shape[:-1], -1), obs], -1)).squeeze(-1)


def energy_loss(
    energy: nn.Module, obs: torch.Tensor, support: torch.Tensor, bq: torch.Tensor, has_support: torch.Tensor
) -> tuple[torch.Tensor, Logs]:
    """-E Σ_k softmax(βQ)_k log softmax(f(s, a_t, t))_k over the K support actions of a state.  [DARE Eq. 34, sign: D11]

    obs (N, O), support (N, K, A), bq = βQ (N, K), has_support (N,) 0 or 1 -> (). One t per state: the softmax compares
    its actions at equal noise.
    """
    labels = bq.softmax(1)
    t = T_MIN + (1 - T_MIN) * torch.rand(len(obs), 1, device=obs.device).expand(bq.shape)
    alpha, sigma = (x[..., None] for x in noise_levels(t))
    x = alpha * support + sigma * torch.randn_like(support)
    log_f = energy(obs[:, None].expand(-1, bq.shape[1], -1), x, t).log_softmax(1)

    def mean(of_rows: torch.Tensor) -> torch.Tensor:
        return (of_rows * has_support).sum() / has_support.sum().clamp(min=1)

    loss, entropy = -mean((labels * log_f).sum(1)), -mean((labels * labels.clamp(min=1e-30).log()).sum(1))
    logs = {"energy/loss": loss.detach(), "energy/label_entropy": entropy}
    return loss, logs | {"energy/std_bq": mean(bq.std(1, correction=0))}


def guided_eps(behavior: nn.Module, energy: nn.Module | None, obs: torch.Tensor, scale: float) -> EpsFn:
    """ε̂ of ν e^{s f} at fixed obs (B, O): ε̂(a_t, t | s) - s σ_t ∇_{a_t} f(s, a_t, t), s `scale`.  [DARE Eqs. 5-6]

    ν's score is -ε̂ / σ_t: + s ∇f on the score is - s σ_t ∇f on ε̂, and actions move uphill.
    """

    def eps_fn(x: torch.Tensor, t: float) -> torch.Tensor:
        time = torch.full((1,), t, device=x.device)
        eps = behavior(x, time, obs)
        if energy is None or scale == 0:
            return eps
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(energy(obs, x, time).sum(), x)
        _, sigma = levels(t)
        return eps - scale * sigma * gradient

    return eps_fn


@torch.no_grad()
def support_actions(behavior: nn.Module, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """K unguided actions per state: obs (N, O), noise N(0, I) (N, K, A) -> (N, K, A), in the action box: D12.  [CEP]"""
    eps_fn = guided_eps(behavior, None, obs.repeat_interleave(noise.shape[1], 0), 0.0)
    return sample_actions(eps_fn, noise.flatten(0, 1)).clamp(-1, 1).view_as(noise)


class Support:
    """Support actions (rows, K, A) of the dataset's rows, then of own rows, as far as `extend` has come.

    As in a ReplayBuffer `rows`, on the host, and `size`, on the device, are one number: a captured step reads `size`.
    """

    def __init__(self, fixed: int, own: int, k: int, act_dim: int, device: torch.device):
        self.actions = torch.zeros(fixed + own, k, act_dim, device=device)
        self.fixed = self.rows = fixed  # rows of the dataset; rows in all
        self.size = torch.tensor(fixed, device=device)

    def extend(self, actions: torch.Tensor) -> None:
        """Append those of the next own rows, (N, K, A)."""
        self.actions[self.rows : self.rows + len(actions)] = actions
        self.rows += len(actions)
        self.size.fill_(self.rows)

    def state_dict(self) -> dict:
        """Those of own rows; the dataset's have a file of their own."""
        return {"actions": self.actions[self.fixed : self.rows].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.rows = self.fixed
        self.extend(state["actions"])


def unit_of_q(args: Args, dataset: data.Dataset, scale: float) -> float:
    """What β Q is divided by: Q is of rewards scale · r, β is meant for r · 1000 / return range, or for r.  U11"""
    if args.energy_units == "reward":
        return scale
    if len(set(dataset.episode_returns())) == 1:
        raise run.UsageError("--energy-units", "qgpo", "reward: all returns are the same")
    return scale * (dataset.return_range() / 1_000)


class Guide:
    """π_0(a|s) ∝ ν(a|s) e^{s f(s, a)}: both models, what trains them before and while going online, the scores.

    Of the run r (common/run.py): `phase` yields the steps still to do, `kept_phase` those of a result that runs share,
    `compiled` compiles a function and `capture` makes a CUDA graph of a step, both on a GPU.
    """

    def __init__(
        self, r: run.Run, dataset: data.Dataset, offline: ReplayBuffer, q_target: nn.Module, scale: float
    ):
        """`offline` is `dataset` as the agent sees it, its rewards multiplied by `scale`."""
        self.r, self.args, self.offline, self.q_target = r, r.args, offline, q_target
        args, (obs_dim, act_dim, *_) = r.args, offline.widths
        r.seed("behavior")  # the same behavior model beside any backbone
        self.behavior = BehaviorNet(obs_dim, act_dim, args.behavior_width).to(r.device)
        self.energy = EnergyNet(obs_dim, act_dim, args.energy_hidden).to(r.device)
        adam = dict(fused=True, capturable=r.device.type == "cuda")
        self.behavior_opt = torch.optim.Adam(self.behavior.parameters(), lr=args.behavior_lr, **adam)
        self.energy_opt = torch.optim.Adam(self.energy.parameters(), lr=args.energy_lr, **adam)
        self.behavior_loss, self.energy_loss = r.compiled(behavior_loss), r.compiled(energy_loss)
        self.batch_behavior = r.compiled(self.behavior)  # for `score`, where the number of rows never changes
        self.has_energy = args.guidance_scale > 0  # else f_φ is neither trained nor asked
        rows = (len(offline), args.online_steps) if self.has_energy else (0, 0)
        self.support = Support(*rows, args.support_k, act_dim, r.device)
        self.beta = args.energy_beta / unit_of_q(args, dataset, scale) if self.has_energy else 0.0
        nets = (FourierTime, ResidualBlock, BehaviorNet)
        code = run.code_of(log_alpha, noise_levels, *nets, behavior_loss, Guide.behavior_step)
        self.settings = r.settings(BEHAVIOR_SETTINGS) | {"code": code}  # what a behavior model depends on
        self.stem = dataset.path.stem

    def state(self) -> dict:
        """What a checkpoint holds, by name."""
        names = ("behavior", "behavior_opt", "energy", "energy_opt", "support")
        return {k: getattr(self, k) for k in names}

    def behavior_step(self) -> Logs:
        """One gradient step of the behavior model, in bf16 on a GPU."""
        batch = self.offline.sample(self.args.behavior_batch)
        on_gpu = batch.obs.is_cuda
        # no cache of cast weights, which a replayed CUDA graph would not renew
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            loss = self.behavior_loss(self.behavior, batch.obs, batch.actions)
        self.behavior_opt.zero_grad(set_to_none=True)
        loss.backward()
        self.behavior_opt.step()
        return {"loss/behavior": loss.detach()}

    def energy_step(self, obs: torch.Tensor, index: torch.Tensor) -> Logs:
        """One gradient step of f_φ on obs (N, O), rows `index` (N,) of `support`; those to come do not count: U14."""
        support, has_support = self.support.actions[index], (index < self.support.size).to(obs)
        with torch.no_grad():  # min of the target twins: U10
            q = self.q_target(obs.repeat_interleave(support.shape[1], 0), support.flatten(0, 1)).amin(0)
        bq = q.view(support.shape[:2]) * self.beta
        loss, logs = self.energy_loss(self.energy, obs, support, bq, has_support)
        self.energy_opt.zero_grad(set_to_none=True)
        loss.backward()
        self.energy_opt.step()
        return logs

    def offline_energy_step(self) -> Logs:
        """The same on states of the dataset."""
        index = self.offline.draw(self.args.energy_batch)
        return self.energy_step(self.offline.obs[index], index)

    def pretrain(self) -> None:
        """Between the phases: behavior model, unless imported or cached; support actions; f_φ on the offline Q: U12."""
        r, args = self.r, self.args
        step_fn, kept = r.capture(self.behavior_step), (self.stem, self.settings)
        for step in r.kept_phase("behavior", args.behavior_steps, *kept, behavior=self.behavior):
            r.log(step, step_fn())
        self.behavior.requires_grad_(False)
        if self.has_energy:
            self.dataset_support()
            step_fn = r.capture(self.offline_energy_step)
            for step in r.phase("energy", args.energy_steps):
                r.log(step, step_fn())

    def dataset_support(self) -> None:
        """Support actions of the dataset's rows, generated once and kept as support.pt in the run directory."""
        path, all_actions = self.r.dir / "support.pt", self.support.actions[: self.support.fixed]
        if path.exists():
            all_actions.copy_(run.load_state(path, self.r.device)["actions"])
            return
        self.r.checkpoint()  # from here on the settings that these depend on are the run's
        # a generator of its own: the run goes on alike, whether these are computed or read
        generator = torch.Generator(self.r.device).manual_seed(self.args.seed)
        chunks = list(zip(all_actions.split(1_024), self.offline.obs.split(1_024), strict=True))
        for actions, obs in tqdm(chunks, desc="support", unit="chunk", disable=None):
            noise = torch.randn(actions.shape, device=self.r.device, generator=generator)
            actions.copy_(support_actions(self.behavior, obs, noise))
        run.save_atomically({"actions": all_actions.clone()}, path)

    def extend_support(self, online: ReplayBuffer) -> None:
        """Support actions of the own rows that have none yet: U14."""
        obs = online.obs[self.support.rows - self.support.fixed :]
        noise = torch.randn(len(obs), *self.support.actions.shape[1:], device=self.r.device)
        self.support.extend(support_actions(self.behavior, obs, noise))

    @torch.no_grad()
    def score(self, batch: Batch, log_std: torch.Tensor) -> tuple[torch.Tensor, Logs]:
        """d (B,) of each row to a reference drawn at its state; log_std (A,) or (B, A) of the policy.  [DARE Eq. 7]"""
        eps_fn = guided_eps(self.batch_behavior, self.energy, batch.obs, self.args.guidance_scale)
        refs = sample_actions(eps_fn, torch.randn_like(batch.actions))
        logs = {"ref/clip_frac": (refs.abs() > 1).float().mean()}
        refs = refs.clamp(-1, 1)  # where data and Q are: D12
        q_ref, q_row = (self.q_target(batch.obs, a).amin(0) for a in (refs, batch.actions))
        n_offline = round(self.args.offline_frac * self.args.batch_size)  # dataset rows first
        gain = q_ref - q_row
        logs |= {"ref/q_gain_off": gain[:n_offline].mean(), "ref/q_gain_on": gain[n_offline:].mean()}
        logs["ref/q_std"] = q_row.std()
        return alignment(self.args.score, batch.actions, refs, log_std), logs


# --- end shared: iql_dare.guidance ---


# From here to `train`: calql.py's networks, losses and updates.
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


# --- shared: calql.actor ---
class TanhGaussianActor(nn.Module):
    """π(a|s) = tanh N(mean(s), σ(s)²): obs (B, O) -> mean, log_std (B, A), before the squash.  [CORL]

    log σ = scale · output + offset, both trained, from 1 and -1; clamped to [-20, 2].
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        gains = [math.sqrt(2)] * 3 + [1e-2]  # D6
        self.weight, self.bias = orthogonal((obs_dim, hidden, hidden, hidden, 2 * act_dim), gains, 1)
        self.log_std_scale, self.log_std_offset = nn.Parameter(torch.ones(())), nn.Parameter(-torch.ones(()))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = obs
        *hidden, (weight_out, bias_out) = zip(self.weight, self.bias, strict=True)
        for weight, bias in hidden:
            x = F.relu(torch.addmm(bias[0], x, weight[0]))
        mean, log_std = torch.addmm(bias_out[0], x, weight_out[0]).chunk(2, -1)
        return mean, (self.log_std_scale * log_std + self.log_std_offset).clamp(-20.0, 2.0)


def squash(mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Action tanh(u), u = mean + σ · noise, and log π(action): all (..., A) -> (..., A), (...,).

    log π = Σ log N(u) - log(1 - tanh² u), with log(1 - tanh² u) = 2 (ln 2 - u - softplus(-2u)).  [SAC App. C]
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return torch.tanh(u), (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


def squashed_log_prob(mean: torch.Tensor, log_std: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """log π(a) of given actions (B, A) -> (B,), clipped to ±0.99999 before atanh: D5."""
    u = torch.atanh(actions.clamp(-0.99999, 0.99999))
    return squash(mean, log_std, (u - mean) * (-log_std).exp())[1]


# --- end shared: calql.actor ---


# --- shared: calql.networks ---
def make_calql_nets(obs_dim: int, act_dim: int, hidden: int, critic_layers: int) -> nn.ModuleDict:
    """actor, qf, q_target (a frozen copy of qf), and log_alpha, log_alpha_prime as parameters of `weights`."""
    nets = nn.ModuleDict()
    nets["actor"] = TanhGaussianActor(obs_dim, act_dim, hidden)
    nets["qf"] = DeepTwinQ(obs_dim, act_dim, hidden, critic_layers)
    nets["q_target"] = DeepTwinQ(obs_dim, act_dim, hidden, critic_layers)
    nets["weights"] = nn.ParameterDict({"log_alpha": torch.zeros(()), "log_alpha_prime": torch.ones(())})
    nets["q_target"].load_state_dict(nets["qf"].state_dict())
    nets["q_target"].requires_grad_(False)
    return nets


# --- end shared: calql.networks ---


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


# --- shared: calql.training ---
def losses(
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
    of_both = nets["actor"](torch.cat([batch.obs, batch.next_obs]))  # one pass, (2B, A) each
    (mean, next_mean), (log_std, next_log_std) = (x[:, None].split(rows) for x in of_both)
    # the actor's own action (B, 1, A) and its log π (B, 1), with gradient
    new_actions, log_pi = squash(mean, log_std, normal[:, 3 * n :])
    backups = n if args.max_target_backup else 1
    with torch.no_grad():  # n of π(s), n of π(s'), the backup's of π(s')
        means = torch.cat([mean.expand(-1, n, -1), next_mean.expand(-1, n + backups, -1)], 1)
        log_stds = torch.cat([log_std.expand(-1, n, -1), next_log_std.expand(-1, n + backups, -1)], 1)
        sampled, sampled_log_prob = squash(means, log_stds, normal[:, : 2 * n + backups])
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
    actor_loss = (log_alpha.detach().exp() * log_pi[:, 0] - q_new).mean()  # [SAC §4.2]
    logs = {"loss/q": td_loss, "loss/actor": actor_loss, "loss/alpha": alpha_loss, "cql/gap": gap.mean()}
    logs |= {"cql/bound_share": share, "q/mean": q[..., 0].mean(), "policy/log_prob": log_pi.mean()}
    logs["policy/data_log_prob"] = squashed_log_prob(mean[:, 0], log_std[:, 0], batch.actions).mean()
    logs |= {"alpha/entropy": log_alpha.exp(), "alpha/lagrange": nets["weights"]["log_alpha_prime"].exp()}
    total = td_loss + cql_loss + lagrange_loss + alpha_loss + actor_loss
    return total, {k: v.detach() for k, v in logs.items()}


# --- end shared: calql.training ---


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
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    n_offline = round(args.offline_frac * args.batch_size)
    run.check_batch(args, dataset=n_offline, own=args.batch_size - n_offline)
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
    nets = make_calql_nets(task.obs_dim, task.act_dim, args.hidden, args.critic_layers).to(r.device)
    opt = make_calql_optimizer(nets, args.policy_lr, args.critic_lr, r.device)

    @torch.no_grad()
    def act(obs: torch.Tensor) -> torch.Tensor:  # deterministic
        return torch.tanh(nets["actor"](obs)[0])

    @torch.no_grad()
    def explore(obs: torch.Tensor) -> torch.Tensor:
        mean, log_std = nets["actor"](obs)
        return squash(mean, log_std, torch.randn_like(mean))[0]

    guide = None  # NEW: behavior model and energy, which only an exchange needs
    if args.exchange_cap != 0:
        guide = Guide(r, dataset, offline, nets["q_target"], args.reward_scale)
    added = guide.state() if guide else {}
    r.register(nets=nets, opt=opt, online=online, interaction=interaction, **returns.state(), **added)
    compiled_losses = r.compiled(losses)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        index = offline.draw(args.batch_size)
        noise = draw_noise(args.batch_size, task.act_dim, args.cql_n_actions, r.device)
        bound = returns.dataset[index] if args.calibrate else None
        loss, logs = compiled_losses(nets, offline.take(index), bound, args.cql_weight, noise, args)
        update(nets, opt, loss, args.polyak)
        return logs

    if args.from_offline and r.once("from_offline"):
        r.import_phase("offline", args.from_offline, offline_settings, nets=nets, opt=opt)
    if guide and args.from_behavior and r.once("from_behavior"):  # NEW
        r.import_phase("behavior", args.from_behavior, guide.settings, behavior=guide.behavior)
    step_fn = r.capture(offline_step)
    for step in r.phase("offline", args.offline_steps):
        r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 and step + 1 < args.offline_steps:
            r.record(step + 1, evaluate(act, r.device))
    if r.once("offline_end"):
        r.record(args.offline_steps, evaluate(act, r.device))
        r.export_phase("offline", offline_settings, nets=nets, opt=opt)  # U3
        evaluate.export(act, r)

    if guide:  # NEW: between the phases
        guide.pretrain()

    # online: one environment step, then utd gradient steps on half dataset, half own experience
    from_dataset = torch.arange(args.batch_size, device=r.device) < n_offline  # NEW

    def online_step() -> dict[str, torch.Tensor]:
        n_online = args.batch_size - n_offline
        index = offline.draw(n_offline), online.draw(n_online, returns.drawable)
        batch = mix(offline.take(index[0]), online.take(index[1]))
        noise = draw_noise(args.batch_size, task.act_dim, args.cql_n_actions, r.device)
        bound = None  # D3
        if args.calibrate_online:
            bound = torch.cat([returns.dataset[index[0]], returns.own[index[1]]])
        off_like, more = from_dataset, {}  # NEW
        if guide:  # NEW [Alg. 1, l. 6-8]
            with torch.no_grad():  # for gauss_std
                log_std = squashed_log_std(*nets["actor"](batch.obs))
            scores, more = guide.score(batch, log_std)
            off_like, split_logs = split(scores, from_dataset, args)
            more |= split_logs
        weight = released_weight(off_like, args)  # NEW [Eq. 14]
        loss, logs = compiled_losses(nets, batch, bound, weight, noise, args)
        update(nets, opt, loss, args.polyak)
        if guide and guide.has_energy:  # NEW [Alg. 1, l. 10], on this batch: U12
            more |= guide.energy_step(batch.obs, torch.cat([index[0], len(offline) + index[1]]))
        return logs | more  # NEW

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
            returns.add_episode(episode["train/episode_length"])
        if guide and guide.has_energy and (step + 1) % args.support_every == 0:  # NEW
            guide.extend_support(online)
        if step >= args.warmup_steps and (interaction.episode or not args.calibrate_online):
            for _ in range(args.utd):
                logs = step_fn()
            r.log(step, logs)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act, r.device))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
