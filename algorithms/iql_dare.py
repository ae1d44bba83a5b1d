"""DARE on IQL: release the offline constraint per sample, by distance to an energy-guided behavior model.

Paper    "DARE: Dynamic Alignment for RElease", ICLR 2026 submission (later arXiv 2511.03828v2): Eq., Table, App. below
         are its. CEP, the guidance: Lu et al., ICML 2023, arXiv 2304.12824; SfBC, the behavior model's network: Chen et
         al., ICLR 2023, arXiv 2209.14548. Backbone: iql.py, line for line outside NEW.
Idea     Some dataset rows look like new behavior, some new rows like the dataset. Each row is scored by its action's
         distance to a reference action of a behavior model guided by Q; a threshold between the scores of dataset and
         own rows exchanges those on its wrong sides. Offline-like rows keep IQL's losses, the others get a max-Q target
         and SAC's actor loss. Theorem 1 fails: the halves move apart, as scores {1, 4} | {2, 5} to {1, 2} | {4, 5}.
Symbols  ν behavior | ε̂ noise estimate | f_φ energy | s guidance_scale | π_0 ∝ ν e^{s f} | â reference, drawn from π_0 |
         d score | τ threshold (IQL's τ: expectile) | β energy_beta (IQL's β: inv_temp) | K support_k |
         M exchanged pairs | n exchange_cap | b'_off, b'_on off_like, ~off_like
Read     iql.py; then NEW: scores, exchange, threshold, losses; behavior model, sampler, energy, Guide; then train
Notes    As in iql.py: D1 one backward, D2 raw rewards, D3 new optimizer online, D4 clipped actions, D5 Q̂ kept, U1 mini.
         D10 paper: KL(a || â) (Eq. 7), 0 or infinite; here: of Gaussians around them, `gauss` ½ |a - â|² (scale has no
            effect), `gauss_std` with the policy's spread: 99 % of mini's rows split alike on IQL, 60 % on Cal-QL, where
            coordinates near ±1 rule. Softmax, kernel-density, ELBO readings fit what the papers print as well.
         D11 paper: e^{-f} in Eq. 34, + ∇f in Eq. 6, together downhill; here: e^{+f}, as CEP's code.
         D12 CEP: samples unbounded; here: clamped to the action box; because they meet data and Q, which end there.
         D13 paper: Eq. 9's two roots; here: the one between the means, without dividing by σ²_on - σ²_off (float32).
         D14 paper: Eq. 16 adds a maximised AWR term to a minimised SAC term; here: both are minimised.
         D15 paper: means over b'_off, b'_on; here: masked means over the batch; the split does not weigh rows.
         D16 paper: Eq. 3 without the square, Eq. 15 without the terminal mask; here: both are there.
         U10 Q in f_φ's labels: min of the target twins.
         U11 its unit: that of CEP's code (QGPO), which β = 3 is from: r · 1000 / return range; r in AntMaze.
         U12 when f_φ learns: energy_steps on the offline Q, then with every gradient step, on its batch.
         U13 K, β, behavior schedule, sampler: CEP's. It narrows peaks (spread 0.3 to 0.24; DPM-Solver++ 2M, 10 steps in
            log-SNR: 0.31), but 91 % of mini's rows are split as with 2M; as with other noise: 68 %.
         U14 support of own rows: every support_every steps; until then they are left out of f_φ's loss.
         U15 D4RL's tasks without a row in the tables: s = 3, the rest as in locomotion (large mazes: AntMaze); Minari,
            Reacher: s = 8. f_φ learns little in the minis' sizes, but references follow it: on seed 100 their Q is 4.0
            above the data's on Reacher (s = 0: 1.3), 2.2 on Hopper (-0.1). With --energy-lr 3e-3 it is 6.1 at s = 3,
            -10.5 at 8; 3.1 on Hopper.
         U17 the "top" M: largest d offline against smallest d online.
         U18 spreads: of the population, at least 1e-6 of the pooled one.
         U19 max over a' in Eq. 15: the best of max_q_samples policy actions under min Q̂.
         U20 critics in the SAC term: online twins, frozen.
         U21 DARE-IV (App. G): Eq. 15's Q-target, Eq. 35's value loss, AWR on all rows in place of the SAC term.
Metrics  split/exchanged M, often < 70 of 128; dare/awr_term, dare/sac_term of Eq. 16, far larger on raw rewards;
         split/tau; split/root_valid: the fits cross between the means, else midpoint; split/gap, split/gap_after of
         mean d, on minus off, below 0: own rows are nearer; ref/q_gain_off, ref/q_gain_on, Q of references less rows';
         ref/q_std; split/off_std, split/on_std; energy/loss; energy/label_entropy, near 0: one-hot labels, weak
         guidance; energy/std_bq; ref/clip_frac of reference coordinates at the box; loss/behavior.
Run      python algorithms/iql_dare.py --env hopper-medium-v2 --seed 0
         no energy --guidance-scale 0 | no exchange --exchange-cap 0, capped 32 | direct exchange --threshold sort |
         DARE-IV --value-loss expectile | UTD 10 --utd 10 --online-steps 100000 | the papers' common start
         --from-offline runs/iql/hopper-medium-v2/seed0 | another run's behavior model --from-behavior RUN
Cost     reacher-mini-v0 from an offline phase: 4.3 CPU minutes; published sizes want a GPU (not measured there).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import data, run
from common.buffer import Batch, ReplayBuffer, mix

# ranges in Args: Natural, Count, Several are integers from 0, 1, 2; Number any, Positive > 0, Weight >= 0; of the
# fractions Share has both 0 and 1, Fraction neither, Portion 0, Rate 1
from common.run import Count, Fraction, Natural, Number, Portion, Positive, Rate, Several, Share, Weight


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
    # IQL
    batch_size: Several = 256  # transitions [DARE Table 5]
    gamma: Share = 0.99  # discount [DARE Table 5]
    polyak: Rate = 0.005  # share of qf copied into q_target at every gradient step [DARE Table 5]
    expectile: Fraction = 0.7  # τ [DARE Table 5]
    inv_temp: Weight = 3.0  # β [DARE Table 5]
    lr: Positive = 3e-4  # Adam, all networks [DARE Table 5]
    hidden: Count = 256  # width of the hidden layers [DARE Table 5]
    normalize_reward: bool = False  # r · 1000 / (largest - smallest episode return): D2
    normalize_obs: bool = False  # (obs - mean) / (std + 1e-3) of the dataset [CORL]
    reward_bias: Number = 0.0  # added to rewards in training, after scaling [PEX: AntMaze]
    dropout: Portion = 0.0  # of the actor's hidden units in its losses [CORL: Adroit]
    # online
    warmup_steps: Natural = 5_000  # environment steps without updates, counted in online_steps [PEX]
    utd: Count = 1  # gradient steps per environment step
    offline_frac: Portion = 0.5  # share of a batch from the dataset [PEX]
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
    exchange_cap: Annotated[int, "[-1, inf)"] = -1  # most pairs exchanged, n [Eq. 10]; -1 all [B.1], 0 none
    value_loss: Literal["iql", "expectile"] = "iql"  # expectile: Eq. 35, DARE-IV
    online_expectile: Fraction = 0.99  # τ of online-like rows; for --value-loss expectile [Eq. 35]
    sac_alpha: Weight = 0.2  # α, fixed entropy weight of Eq. 16, locomotion [B.1]
    max_q_samples: Count = 10  # policy actions behind max_a' Q: U19


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(  # [IQL App. B; episodes: CORL]
        expectile=0.9, inv_temp=10.0, reward_bias=-1.0, eval_every=10_000, eval_episodes=100,
        guidance_scale=3.0, support_k=32, energy_units="reward", sac_alpha=0.01,
    ),
    **{k: dict(expectile=0.8, dropout=0.1, normalize_obs=True, guidance_scale=3.0)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [CORL]; U15
    "maze2d-": dict(normalize_obs=True, eval_episodes=100, guidance_scale=3.0),  # [CORL, offline IQL]; U15
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
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, lr=5e-4, polyak=0.01,
        normalize_obs=True, normalize_reward=True,
        behavior_steps=3_000, behavior_batch=512, behavior_lr=1e-3, behavior_width=64,
        energy_steps=1_000, energy_hidden=32, support_k=4,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=15_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "expectile", "inv_temp", "lr", "hidden",
    "normalize_reward", "normalize_obs", "reward_bias", "dropout",
)  # fmt: skip
BEHAVIOR_SETTINGS = (  # NEW: what a behavior model depends on, beside the dataset and the code
    "behavior_steps", "behavior_batch", "behavior_lr", "behavior_width", "normalize_obs",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "exchange_cap != 0": (
        "from_behavior", "behavior_steps", "behavior_batch", "behavior_lr", "behavior_width", "guidance_scale",
        "score", "threshold",
    ),
    "exchange_cap != 0 and guidance_scale > 0": (
        "energy_steps", "energy_batch", "energy_lr", "energy_hidden", "energy_beta", "energy_units", "support_k",
        "support_every",
    ),
    "value_loss == 'expectile'": ("online_expectile",),
    "value_loss == 'iql'": ("sac_alpha",),
}  # fmt: skip


# NEW: the method, down to the blocks of iql.py. First the split of a batch: scores, threshold, exchange.
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


# NEW: losses of the online phase, made of iql.py's value_loss [Eq. 2], td_target [Eq. 3], awr_weight · log_prob [Eq. 4]
# --- shared: iql_dare.max_target ---
def max_target_q(q_target: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """max over S actions of min Q̂: obs (B, O), actions (S, B, A) -> (B,).  [DARE Eq. 15]: U19"""
    samples, rows, _ = actions.shape
    q = q_target(obs.repeat(samples, 1), actions.flatten(0, 1)).amin(0)
    return q.view(samples, rows).amax(0)


# --- end shared: iql_dare.max_target ---


def frozen_q(qf: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """qf(obs, actions) (K, B) with gradients to the actions but none to the critic."""
    weights = {k: p.detach() for k, p in qf.named_parameters()}
    return torch.func.functional_call(qf, weights, (obs, actions))


def dare_losses(
    nets: nn.ModuleDict, batch: Batch, off_like: torch.Tensor, noise: torch.Tensor, args: Args
) -> tuple[torch.Tensor, Logs]:
    """`losses` where off_like (B,) bool; elsewhere released: a max-Q target for Q, SAC's loss for the actor.

    noise (1 + S, B, A) ~ N(0, I): [0] for the actor's new action at s, the others for S next actions.
    """
    mean, log_std = nets["actor"](batch.obs)
    with torch.no_grad():
        q_hat = nets["q_target"](batch.obs, batch.actions).amin(0)  # (2, B) -> (B,)
        v_next = nets["vf"](batch.next_obs)
        next_actions = nets["actor"](batch.next_obs)[0] + log_std.exp() * noise[1:]  # (S, B, A)
        max_q = max_target_q(nets["q_target"], batch.next_obs, next_actions.clamp(-1, 1))
        v_next = torch.where(off_like, v_next, max_q)  # [Eq. 15]
    adv = q_hat - nets["vf"](batch.obs)
    expectile = args.expectile
    if args.value_loss == "expectile":  # DARE-IV: a higher one where released [Eq. 35]
        expectile = torch.where(off_like, args.expectile, args.online_expectile)
    v_loss = value_loss(adv, expectile)  # [Eq. 2], on all rows
    target = td_target(batch.rewards, batch.terminations, v_next, args.gamma)
    q = nets["qf"](batch.obs, batch.actions)
    q_loss = (q - target).square().mean()  # [Eq. 15], squared, terminals masked: D16; over all rows: D15
    awr = -awr_weight(adv, args.inv_temp) * log_prob(mean, log_std, batch.actions)  # [Eq. 4]
    new_actions = mean + log_std.exp() * noise[0]  # reparameterised; its log π is the unclamped one's
    q_new = frozen_q(nets["qf"], batch.obs, new_actions.clamp(-1, 1)).amin(0)  # online twins, not Q̂: U20
    sac = args.sac_alpha * log_prob(mean, log_std, new_actions) - q_new
    awr_rows = off_like if args.value_loss == "iql" else torch.ones_like(off_like)  # DARE-IV: no SAC: U21
    awr_term, sac_term = (awr_rows * awr).mean(), (~awr_rows * sac).mean()
    actor_loss = awr_term + sac_term  # [Eq. 16], both minimised: D14; over all rows: D15
    logs = {"loss/v": v_loss, "loss/q": q_loss, "loss/actor": actor_loss}
    logs |= {"q/mean": q.mean(), "adv/mean": adv.mean(), "log_std/mean": log_std.mean()}
    logs |= {"dare/awr_term": awr_term, "dare/sac_term": sac_term}
    return v_loss + q_loss + actor_loss, {k: v.detach() for k, v in logs.items()}


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


# From here to `train`: iql.py's networks, losses and updates.
# --- shared: iql.actor ---
class GaussianActor(nn.Module):
    """π(a|s) = N(mean(s), diag σ²): obs (B, O) -> mean (B, A) in (-1, 1), log_std (A,) in [-5, 2].  [PEX]

    Only the mean is squashed, so the density has no Jacobian term. Xavier-uniform weights, zero biases. Dropout works
    where gradients do, in the actor's losses, and never under no_grad.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        sizes = (obs_dim, hidden, hidden, act_dim)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.log_std, self.dropout = nn.Parameter(torch.zeros(act_dim)), dropout
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, hidden_layers = obs, self.layers[:-1]
        for layer in hidden_layers:
            x = F.dropout(F.relu(layer(x)), self.dropout, training=torch.is_grad_enabled())
        return torch.tanh(self.layers[-1](x)), self.log_std.clamp(-5.0, 2.0)


# --- end shared: iql.actor ---


# --- shared: iql.critics ---
class TwinQ(nn.Module):
    """Two Q networks as stacked weights, one batched matmul per layer: obs (B, O), actions (B, A) -> (2, B)."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        sizes = (obs_dim + act_dim, hidden, hidden, 1)
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise(sizes):
            bound = 1 / math.sqrt(i)  # nn.Linear's own, per network
            self.weight.append(torch.empty(2, i, o).uniform_(-bound, bound))
            self.bias.append(torch.empty(2, 1, o).uniform_(-bound, bound))

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], -1).expand(2, -1, -1)
        x = F.relu(torch.baddbmm(self.bias[0], x, self.weight[0]))
        x = F.relu(torch.baddbmm(self.bias[1], x, self.weight[1]))
        return torch.baddbmm(self.bias[2], x, self.weight[2]).squeeze(-1)


class ValueNet(nn.Module):
    """V(s): obs (B, O) -> (B,)."""

    def __init__(self, obs_dim: int, hidden: int):
        super().__init__()
        first, second, last = nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs).squeeze(-1)


# --- end shared: iql.critics ---


# --- shared: iql.networks ---
def make_nets(obs_dim: int, act_dim: int, hidden: int, dropout: float = 0.0) -> nn.ModuleDict:
    """actor, qf, q_target (a frozen copy of qf), vf."""
    nets = nn.ModuleDict()
    nets["actor"] = GaussianActor(obs_dim, act_dim, hidden, dropout)
    nets["qf"] = TwinQ(obs_dim, act_dim, hidden)
    nets["q_target"] = TwinQ(obs_dim, act_dim, hidden)
    nets["vf"] = ValueNet(obs_dim, hidden)
    nets["q_target"].load_state_dict(nets["qf"].state_dict())
    nets["q_target"].requires_grad_(False)
    return nets


# --- end shared: iql.networks ---


# --- shared: iql.losses ---
def value_loss(adv: torch.Tensor, expectile: float | torch.Tensor) -> torch.Tensor:
    """L_V = E[ |τ - 1(A < 0)| A² ], A = Q̂ - V; adv (B,), τ a number or (B,) -> ().  [IQL Eq. 5]"""
    return (torch.abs(expectile - (adv < 0).to(adv)) * adv.square()).mean()


def td_target(
    rewards: torch.Tensor, terminations: torch.Tensor, v_next: torch.Tensor, gamma: float
) -> torch.Tensor:
    """r + γ (1 - terminated) V(s'), all (B,); rewards in training units.  [IQL Eq. 6]

    Truncated transitions keep their bootstrap: next_obs must be the last observation of the episode.
    """
    return rewards + gamma * (1 - terminations) * v_next


def log_prob(mean: torch.Tensor, log_std: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """log N(a; mean, diag σ²): (B, A), (A,), (B, A) -> (B,)."""
    z = (actions - mean) * (-log_std).exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def awr_weight(adv: torch.Tensor, inv_temp: float) -> torch.Tensor:
    """min(exp(β A), 100), (B,), no gradient.  [IQL Eq. 7; the bound: official code]"""
    return (inv_temp * adv.detach()).exp().clamp(max=100.0)


# --- end shared: iql.losses ---


# --- shared: iql.training ---
def losses(nets: nn.ModuleDict, batch: Batch, args: Args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the three losses, which share no parameter, and what to log; from the old parameters: D1."""
    with torch.no_grad():
        q_hat = nets["q_target"](batch.obs, batch.actions).amin(0)  # (2, B) -> (B,)
        v_next = nets["vf"](batch.next_obs)
    adv = q_hat - nets["vf"](batch.obs)
    v_loss = value_loss(adv, args.expectile)  # [IQL Eq. 5]
    target = td_target(batch.rewards, batch.terminations, v_next, args.gamma)
    q = nets["qf"](batch.obs, batch.actions)
    q_loss = (q - target).square().mean()  # [IQL Eq. 6], mean over batch and both critics
    mean, log_std = nets["actor"](batch.obs)
    weight = awr_weight(adv, args.inv_temp)
    actor_loss = -(weight * log_prob(mean, log_std, batch.actions)).mean()  # [IQL Eq. 7]
    logs = {"loss/v": v_loss, "loss/q": q_loss, "loss/actor": actor_loss}
    logs |= {"q/mean": q.mean(), "adv/mean": adv.mean(), "log_std/mean": log_std.mean()}
    return v_loss + q_loss + actor_loss, {k: v.detach() for k, v in logs.items()}


def update(nets: nn.ModuleDict, opt: torch.optim.Optimizer, loss: torch.Tensor, polyak: float) -> None:
    """One gradient step and the target update; nothing in here waits for the GPU."""
    opt.zero_grad(set_to_none=True)
    loss.backward()  # disjoint parameters: the same as one backward per loss
    opt.step()
    with torch.no_grad():
        torch._foreach_lerp_([*nets["q_target"].parameters()], [*nets["qf"].parameters()], polyak)


def make_optimizer(nets: nn.ModuleDict, lr: float, device: torch.device) -> torch.optim.Adam:
    """Adam over both critics, V and (second group, learning rate a tensor) the actor."""
    critics = [*nets["qf"].parameters(), *nets["vf"].parameters()]
    actor = {"params": [*nets["actor"].parameters()], "lr": torch.tensor(lr, device=device)}
    return torch.optim.Adam([{"params": critics}, actor], lr=lr, fused=True, capturable=device.type == "cuda")


def decay_actor_lr(opt: torch.optim.Adam, updates: torch.Tensor, lr: float, steps: int) -> None:
    """Set lr/2 (1 + cos(π n / steps)) for the n-th update, n from 0, and count it, on the device.  [IQL App. B]"""
    opt.param_groups[1]["lr"].copy_(0.5 * lr * (1 + torch.cos(updates * (math.pi / max(steps, 1)))))
    updates.add_(1)


def restart_optimizer(opt: torch.optim.Adam, lr: float) -> None:
    """The state of a fresh optimizer with constant learning rate, in place: D3."""
    opt.param_groups[1]["lr"].fill_(lr)
    for state in opt.state.values():
        for x in state.values():
            x.zero_()


# --- end shared: iql.training ---


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
    reward_scale = 1_000 / dataset.return_range() if args.normalize_reward else 1.0  # D2
    units = data.Units(reward_scale, args.reward_bias, moments)
    offline = dataset.buffer(units, r.device)
    online = offline.like(args.online_steps)
    interaction = data.Interaction(data.make_env(task, units), online, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    nets = make_nets(task.obs_dim, task.act_dim, args.hidden, args.dropout).to(r.device)
    opt = make_optimizer(nets, args.lr, r.device)
    updates = torch.zeros((), device=r.device)  # of the offline phase

    @torch.no_grad()
    def act(obs: torch.Tensor) -> torch.Tensor:  # deterministic
        return nets["actor"](obs)[0]

    @torch.no_grad()
    def explore(obs: torch.Tensor) -> torch.Tensor:
        mean, log_std = nets["actor"](obs)
        return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)  # D4

    guide = None  # NEW: behavior model and energy, which only an exchange needs
    if args.exchange_cap != 0:
        guide = Guide(r, dataset, offline, nets["q_target"], reward_scale)
    added = guide.state() if guide else {}
    r.register(nets=nets, opt=opt, updates=updates, online=online, interaction=interaction, **added)
    compiled_losses = r.compiled(losses)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        decay_actor_lr(opt, updates, args.lr, args.offline_steps)
        loss, logs = compiled_losses(nets, offline.sample(args.batch_size), args)
        update(nets, opt, loss, args.polyak)
        return logs

    if args.from_offline and r.once("from_offline"):
        r.import_phase("offline", args.from_offline, offline_settings, nets=nets)
    if guide and args.from_behavior and r.once("from_behavior"):  # NEW
        r.import_phase("behavior", args.from_behavior, guide.settings, behavior=guide.behavior)
    step_fn = r.capture(offline_step)
    for step in r.phase("offline", args.offline_steps):
        r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 and step + 1 < args.offline_steps:
            r.record(step + 1, evaluate(act, r.device))
    if r.once("offline_end"):
        r.record(args.offline_steps, evaluate(act, r.device))
        r.export_phase("offline", offline_settings, nets=nets)
        evaluate.export(act, r)
        restart_optimizer(opt, args.lr)  # D3; q_target stays: D5

    if guide:  # NEW: between the phases
        guide.pretrain()

    # online: one environment step, then utd gradient steps on half dataset, half own experience
    from_dataset = torch.arange(args.batch_size, device=r.device) < n_offline  # NEW
    compiled_dare_losses = r.compiled(dare_losses)  # NEW

    def online_step() -> dict[str, torch.Tensor]:
        index = offline.draw(n_offline), online.draw(args.batch_size - n_offline)
        batch = mix(offline.take(index[0]), online.take(index[1]))
        off_like, more = from_dataset, {}  # NEW: by origin, but for exchanges
        if guide:  # NEW [Alg. 1, l. 6-8]
            scores, more = guide.score(batch, nets["actor"].log_std.clamp(-5.0, 2.0))  # σ for gauss_std
            off_like, split_logs = split(scores, from_dataset, args)
            more |= split_logs
        noise = torch.randn(1 + args.max_q_samples, *batch.actions.shape, device=r.device)  # NEW
        loss, logs = compiled_dare_losses(nets, batch, off_like, noise, args)  # NEW
        update(nets, opt, loss, args.polyak)
        if guide and guide.has_energy:  # NEW [Alg. 1, l. 10], on this batch: U12
            more |= guide.energy_step(batch.obs, torch.cat([index[0], len(offline) + index[1]]))
        return logs | more  # NEW

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
        if guide and guide.has_energy and (step + 1) % args.support_every == 0:  # NEW
            guide.extend_support(online)
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
