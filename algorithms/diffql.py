"""Diffusion-QL, offline and then online: the policy is a denoiser of actions, and Q is maximised through its chain.

Paper    Wang, Hunt, Zhou, "Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning",
         ICLR 2023, arXiv 2208.06193v3: Eq., Alg., App. below; its public code where they are silent: [code]. DUAL (Bui
         et al., arXiv 2605.30776v1) fine-tunes it online as Diff-QL and distils it as D-Diff-QL; how is left open
         there. Distillation: Salimans, Ho, ICLR 2022, arXiv 2202.00512.
Idea     A chain of five denoising steps draws actions that a Gaussian cannot. Its denoising loss is behavior cloning,
         and the only constraint; beside it stands -Q of the chain's own action, divided by the mean of |Q|, so that one
         weight η serves tasks whose Q differ in size. Its gradient passes through all steps of the chain.
Symbols  ε̂ actor, noise estimate | x noised action | t level, 0 to T - 1 | T denoise_steps | ᾱ alpha_bar, share of an
         action's variance that is left at t | η eta | Q̂ q_target | γ gamma | v, u, φ: of the chain that can be halved
Read     Args, ENV_PRESETS, denoiser, chain, (its form that can be halved), critics, losses, update, acting,
         (Distiller), train; what is in brackets only --distill needs
Notes    D110 order of updates: in the code the actor learns from critics that have just moved; here all losses are from
            the parameters before the step, one backward, as in every file.
         D111 length: 2M steps (AntMaze, pen: 1M), a score every 50k, and the best checkpoint counts; here DUAL's 1M
            offline, 1M online [CORL], scores as often as in every file, and last scores and means count.
         D112 the code's AntMaze is v0; here v2, which DUAL's tables have.
         D113 Eq. 1 adds noise of std √β_t and bounds nothing; the code clips each step's clean estimate to the box and
            has the std of q(x_{t-1} | x_t, x_0), and so have we.
         U110 online, where the paper has nothing: one buffer of dataset and own rows, uniform batches, the offline
            losses; optimizer, average and its count go on unchanged; warm-up as in every file.
         U111 online actions are drawn as in evaluation, without more noise.
         U112 tasks without a row in the code: Adroit as pen-cloned, others as medium of their robot, mazes as AntMaze
            medium but for the reward; the paper's optional cosine decay is off.
         U113 --distill: five steps cannot be halved and the chain's noise cannot be distilled; so v, cosine schedule,
            eight steps without noise or clipping on the way, halved before the online phase as dual.py does, around
            the policy's own actions; online, loss and average are those of a chain of one step.
         U143 Frozen-Lake (reasons at ENV_PRESETS): lengths, rewards of 10 and own rows only online as in dual.py.
         U1 hopper-mini-v0: sizes that finish in minutes on two CPU cores; not a published setting.
Metrics  loss/q; loss/bc, the denoising loss, by which the paper picks checkpoints; loss/actor; q/mean on the batch;
         q/policy of own actions; actor/data_gap, mean square of own less data's actions; eval/score normalised.
Run      python algorithms/diffql.py --env hopper-medium-v2 --seed 0
         behavior cloning --eta 0 | acting without the critic --candidates 1 | the paper's T: --denoise-steps 2 to 20
         D-Diff-QL: --distill
Cost     published sizes: 16 gradient steps a second on one core, 5 with max_q_backup (AntMaze); mini tasks: 11 CPU
         milliseconds a step; GPU not measured.
Fails    not known yet.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, run
from common.buffer import Batch, mix
from common.run import Count, Natural, Number, Portion, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [DUAL; CORL]: D111
    online_steps: Natural = 1_000_000  # environment steps [DUAL; CORL]: D111
    from_offline: Path | None = None  # run directory (or its offline.pt) to take the offline phase from
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it works
    compile: bool | None = None  # compile and capture the gradient step; default: on for cuda, off for cpu
    out_dir: Path = Path("runs")  # the run lives in <out-dir>/<file>/<env>/seed<seed>
    overwrite: bool = False  # start anew instead of resuming
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to the run directory, for TensorBoard
    eval_every: Count = 5_000  # steps of the running phase [CORL]
    eval_episodes: Count = 10  # episodes of an evaluation [code]
    # Diffusion-QL
    batch_size: Several = 256  # transitions [code]
    gamma: Share = 0.99  # discount [code]
    polyak: Rate = 0.005  # share of qf copied into q_target at every gradient step [code]
    actor_lr: Positive = 3e-4  # Adam, denoiser [code, per task]
    qf_lr: Positive = 3e-4  # Adam, critics [code]
    hidden: Count = 256  # width of the hidden layers [code]
    denoise_steps: Count = 5  # T, of the chain [code]
    # D-Diff-QL: U113
    distill: bool = False  # a chain that halves to one step before the online phase [DUAL: D-Diff-QL]: U113
    distill_from: Several = 8  # T of that chain, a power of two
    halving_steps: Count = 20_000  # gradient steps per halving, twice as many to 2 and 1 denoising steps
    distill_lr: Positive = 3e-4  # Adam, linear to 0 in each halving [dual.py]
    # Diffusion-QL
    eta: Weight = 1.0  # η, weight of Q beside behavior cloning [code, per task]
    max_q_backup: bool = False  # TD target from the best of backup_actions next actions [code, per task]
    backup_actions: Count = 10  # next actions per row of such a target [code]
    grad_clip: Weight = 9.0  # largest gradient norm of denoiser and of critics; 0: none [code, per task]
    ema_decay: Portion = 0.995  # of the denoiser's average, whose actions the TD target takes [code]
    ema_start: Natural = 1_000  # gradient steps until which the average stays at its start [code]
    ema_every: Count = 5  # gradient steps from one move of the average to the next [code]
    candidates: Count = 50  # actions of the chain, of which acting draws one by softmax of Q [code]
    normalize_obs: bool = False  # (obs - mean) / (std + 1e-3) of the dataset
    normalize_reward: bool = False  # r · 1000 / (largest - smallest episode return)
    standardize_reward: bool = False  # (r - mean) / std of the dataset [code: Adroit]
    reward_scale: Positive = 1.0  # rewards in training: scale · r + bias, r from above [code: AntMaze]
    reward_bias: Number = 0.0  # added to rewards in training, after scaling [code: AntMaze]
    # online: U110
    warmup_steps: Natural = 5_000  # environment steps without updates, counted in online_steps
    utd: Count = 1  # gradient steps per environment step
    offline_frac: Portion = 0.5  # share of a batch from the dataset; 0 = own rows only
    append_online: bool = True  # one buffer, batches from all of it; off for Frozen-Lake: U143


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    # [code, per task]; robots' rows are those of medium, which others go by: U112
    "halfcheetah-medium-replay": dict(grad_clip=2.0),
    "halfcheetah-medium-expert": dict(grad_clip=7.0),
    "hopper-medium-replay": dict(grad_clip=4.0),
    "hopper-medium-expert": dict(grad_clip=5.0),
    "walker2d-": dict(grad_clip=1.0),
    "walker2d-medium-replay": dict(grad_clip=4.0),
    "walker2d-medium-expert": dict(grad_clip=5.0),
    "antmaze-": dict(  # [code, of v0: D112]
        reward_scale=4.0, reward_bias=-2.0, max_q_backup=True, eval_every=10_000, eval_episodes=100,
    ),
    "antmaze-umaze-v2": dict(eta=0.5, max_q_backup=False, grad_clip=2.0),
    "antmaze-umaze-diverse": dict(eta=2.0, grad_clip=3.0),
    "antmaze-medium-play": dict(eta=2.0, grad_clip=2.0, actor_lr=1e-3),
    "antmaze-medium-diverse": dict(eta=3.0, grad_clip=1.0),
    "antmaze-large-play": dict(eta=4.5, grad_clip=10.0),
    "antmaze-large-diverse": dict(eta=3.5, grad_clip=7.0),
    **{k: dict(actor_lr=3e-5, eta=0.1, grad_clip=8.0, standardize_reward=True, eval_episodes=100)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [code, pen-cloned: U112]
    "pen-human": dict(eta=0.15, grad_clip=7.0),  # [code]
    "maze2d-": dict(eta=2.0, max_q_backup=True, grad_clip=2.0, eval_episodes=100),  # ours: U112
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128,
        actor_lr=1e-3, qf_lr=1e-3, polyak=0.02, ema_start=0, ema_every=1, ema_decay=0.98, candidates=20,
        halving_steps=300, distill_lr=1e-3, normalize_obs=True, normalize_reward=True,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50),
    # U143, numbers of dual.py: acting draws by softmax of Q, which for rewards of 0 and 1 is next to uniform; most of a
    # common buffer would be of the old slip; η as in the mazes, but no best of ten in targets: where Q is asked off
    # the four moves that the data know, the best is an error
    "frozenlake-": dict(
        offline_steps=6_000, online_steps=20_000, warmup_steps=2_000, eval_every=500, eval_episodes=1,
        reward_scale=10.0, append_online=False, offline_frac=0.0, eta=2.0, grad_clip=2.0, halving_steps=1_500,
    ),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "actor_lr", "qf_lr", "hidden",
    "denoise_steps", "distill", "distill_from", "eta", "max_q_backup", "backup_actions",
    "grad_clip", "ema_decay", "ema_start", "ema_every",
    "normalize_obs", "normalize_reward", "standardize_reward", "reward_scale", "reward_bias",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "max_q_backup": ("backup_actions",),
    "distill": ("distill_from", "halving_steps", "distill_lr"),
    "not distill": ("denoise_steps",),
    "not append_online": ("offline_frac",),
}


# --- shared: diffql.chain ---
def vp_alphas(steps: int) -> list[float]:
    """1 - β_t of the variance-preserving schedule, β from 0.1 to 10, t = 0, ..., T - 1.  [code]"""
    low, high = 0.1, 10.0
    return [math.exp(-low / steps - (high - low) * (2 * t + 1) / (2 * steps**2)) for t in range(steps)]


class Denoiser(nn.Module):
    """ε̂(x, t, s): obs (B, O), noised actions x (B, A), levels t (B,) or (1,) integers -> noise (B, A).  [code]"""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, steps: int):
        super().__init__()
        self.act_dim, self.levels, self.draws = act_dim, steps, steps  # draws: normal numbers of a chain
        self.alphas = vp_alphas(steps)
        alpha_bar = torch.tensor(self.alphas, dtype=torch.float64).cumprod(0)
        self.register_buffer("alpha_bar", alpha_bar.float())  # of rows that each have a t of their own
        self.register_buffer("frequencies", 10_000.0 ** (-torch.arange(8) / 7))
        self.time = nn.Sequential(nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        sizes = (act_dim + 16 + obs_dim, hidden, hidden, hidden)
        layers = [x for i, o in pairwise(sizes) for x in (nn.Linear(i, o), nn.Mish())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, act_dim))

    def forward(self, obs: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * self.frequencies
        e = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        return self.net(torch.cat([x, e.expand(x.shape[0], -1), obs], 1))


def draw_chain(actor: nn.Module, rows: int, device: torch.device) -> torch.Tensor:
    """N(0, I) (T, rows, A): where the chain starts, and what it adds after each step but the last, if it adds any."""
    return torch.randn(actor.draws, rows, actor.act_dim, device=device)


def noisy_chain(actor: Denoiser, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Actions (B, A) in [-1, 1] of the reverse process, with gradient: obs (B, O), noise (T, B, A).  [Eq. 1]

    Each step's estimate of the clean action is clipped to the box; with it the step is the mean of
    q(x_{t-1} | x_t, x_0), and noise of that distribution's std, as in the code: D113.
    """
    x, alphas = noise[0], actor.alphas
    for t in reversed(range(len(alphas))):
        beta, before = 1 - alphas[t], math.prod(alphas[:t])  # before: ᾱ at t - 1, 1 at the end
        here = before * alphas[t]
        eps = actor(obs, x, torch.full((1,), t, device=x.device))
        clean = ((x - math.sqrt(1 - here) * eps) / math.sqrt(here)).clamp(-1, 1)
        share = math.sqrt(before) * beta / (1 - here), math.sqrt(alphas[t]) * (1 - before) / (1 - here)
        x = share[0] * clean + share[1] * x
        if t > 0:
            x = x + math.sqrt(beta * (1 - before) / (1 - here)) * noise[len(alphas) - t]
    return x


def bc_loss(
    actor: Denoiser, obs: torch.Tensor, actions: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """L_d = E (ε - ε̂(√ᾱ a + √(1 - ᾱ) ε, t, s))², mean over rows and dimensions: t (B,), ε (B, A) -> ().  [Eq. 2]"""
    left = actor.alpha_bar[t][:, None]
    return (actor(obs, left.sqrt() * actions + (1 - left).sqrt() * eps, t) - eps).square().mean()


# --- end shared: diffql.chain ---


# The chain that can be halved: x = cos φ a + sin φ ε at φ = π u / 2, v = cos φ ε - sin φ a, no noise on the way.


class VDenoiser(nn.Module):
    """v̂(x, t, s) at u = (t + 1) / levels, arguments and layers as Denoiser's; `levels`, T, changes with a halving."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, steps: int):
        super().__init__()
        self.act_dim, self.levels, self.draws, self.finest = act_dim, steps, 1, steps
        self.eps = Denoiser(obs_dim, act_dim, hidden, steps)  # its layers, not its chain

    def forward(self, obs: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.eps(obs, x, (t + 1) * (self.finest / self.levels) - 1)


def rotate(z: torch.Tensor, v: torch.Tensor, angle: float) -> torch.Tensor:
    """One DDIM step by `angle`: cos z - sin v; from φ = angle it is the clean estimate.  [Salimans & Ho]"""
    return math.cos(angle) * z - math.sin(angle) * v


def quiet_chain(actor: nn.Module, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Actions (B, A) of the deterministic sampler from noise (1, B, A), clipped to the box at the end only: U113."""
    x = noise[0]
    for t in reversed(range(actor.levels)):
        v = actor(obs, x, torch.full((1,), t, device=x.device))
        x = rotate(x, v, 0.5 * math.pi / actor.levels)
    return x.clamp(-1, 1)


def v_loss(
    actor: nn.Module, obs: torch.Tensor, actions: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """E (v - v̂(cos φ a + sin φ ε, t, s))², mean over rows and dimensions: as bc_loss -> ().  [Salimans & Ho]"""
    cos, sin = (f(0.5 * math.pi * (t[:, None] + 1) / actor.levels) for f in (torch.cos, torch.sin))
    return (actor(obs, cos * actions + sin * eps, t) - (cos * eps - sin * actions)).square().mean()


def run_chain(actor: nn.Module, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The actor's actions (B, A) in [-1, 1] for obs (B, O) and what draw_chain drew."""
    return (quiet_chain if isinstance(actor, VDenoiser) else noisy_chain)(actor, obs, noise)


def clone_loss(actor: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
    """Behavior cloning: the loss of the actor's kind of chain."""
    return (v_loss if isinstance(actor, VDenoiser) else bc_loss)(actor, *batch)


def halved_target(
    teacher: nn.Module, obs: torch.Tensor, x: torch.Tensor, t: torch.Tensor, levels: int
) -> torch.Tensor:
    """The v that takes x in one step of `levels` where the teacher, of twice as many, gets in two.  [Salimans & Ho]

    v* = (cos 2δ x - x₂) / sin 2δ, δ = π / (4 levels); t (B,) of the student, 2 t + 1 and 2 t of the teacher.
    """
    delta = 0.25 * math.pi / levels
    x1 = rotate(x, teacher(obs, x, 2 * t + 1), delta)
    x2 = rotate(x1, teacher(obs, x1, 2 * t), delta)
    return (math.cos(2 * delta) * x - x2) / math.sin(2 * delta)


def halving_loss(student: nn.Module, teacher: nn.Module, obs: torch.Tensor) -> torch.Tensor:
    """E (v̂ - v*)² at levels t of the student, around actions of the teacher's own: they are not the data's now. U113"""
    t = torch.randint(student.levels, (len(obs),), device=obs.device)
    with torch.no_grad():
        actions = run_chain(teacher, obs, draw_chain(teacher, len(obs), obs.device))
        cos, sin = (f(0.5 * math.pi * (t[:, None] + 1) / student.levels) for f in (torch.cos, torch.sin))
        x = cos * actions + sin * torch.randn_like(actions)
        target = halved_target(teacher, obs, x, t, student.levels)
    return (student(obs, x, t) - target).square().mean()


# --- shared: diffql.critics ---
class MishTwinQ(nn.Module):
    """Two critics as stacked weights, one batched matmul per layer: obs (B, O), actions (B, A) -> (2, B).  [code]"""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise((obs_dim + act_dim, hidden, hidden, hidden, 1)):
            bound = 1 / math.sqrt(i)  # nn.Linear's own, per network
            self.weight.append(torch.empty(2, i, o).uniform_(-bound, bound))
            self.bias.append(torch.empty(2, 1, o).uniform_(-bound, bound))

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], -1).expand(2, -1, -1)
        *hidden, (weight_out, bias_out) = zip(self.weight, self.bias, strict=True)
        for weight, bias in hidden:
            x = F.mish(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(bias_out, x, weight_out).squeeze(-1)


# --- end shared: diffql.critics ---


def make_diffql_nets(obs_dim: int, act_dim: int, args: Args) -> nn.ModuleDict:
    """actor, average (of it), qf, q_target (a frozen copy of qf); `updates`, how many, is a buffer beside them."""
    nets = nn.ModuleDict()
    if args.distill:
        nets["actor"] = VDenoiser(obs_dim, act_dim, args.hidden, args.distill_from)
    else:
        nets["actor"] = Denoiser(obs_dim, act_dim, args.hidden, args.denoise_steps)
    nets["qf"] = MishTwinQ(obs_dim, act_dim, args.hidden)
    for copy, of in {"average": "actor", "q_target": "qf"}.items():
        nets[copy] = deepcopy(nets[of]).requires_grad_(False)
    nets.register_buffer("updates", torch.zeros((), dtype=torch.int64))
    return nets


# --- shared: diffql.learning ---
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


def frozen_q(qf: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """qf(obs, actions) (K, B) with gradients to the actions but none to the critic."""
    weights = {k: p.detach() for k, p in qf.named_parameters()}
    return torch.func.functional_call(qf, weights, (obs, actions))


def td_target(
    rewards: torch.Tensor, terminations: torch.Tensor, v_next: torch.Tensor, gamma: float
) -> torch.Tensor:
    """r + γ (1 - terminated) V(s'), all (B,); rewards in training units.  [IQL Eq. 6]

    Truncated transitions keep their bootstrap: next_obs must be the last observation of the episode.
    """
    return rewards + gamma * (1 - terminations) * v_next


def next_q(nets: nn.ModuleDict, next_obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Q̂ of the average's actions (B,): the best of M for each critic, then the lower of both.  [Eq. 4; code]

    next_obs (B, O), noise (T, B M, A).
    """
    many = noise.shape[1] // len(next_obs)
    actions = run_chain(nets["average"], next_obs.repeat_interleave(many, 0), noise)
    q = q_of_many(nets["q_target"], next_obs, actions.view(len(next_obs), many, -1))  # (2, B, M)
    return q.amax(-1).amin(0)


def normalised_q_loss(q: torch.Tensor, coin: torch.Tensor) -> torch.Tensor:
    """L_q / η = -mean Q_i / mean |Q_j|, i = 1 if coin () > 0.5, else 2, j the other: q (2, B) -> ().  [code]"""
    mean, size = q.mean(1), q.detach().abs().mean(1)
    return -torch.where(coin > 0.5, mean[0] / size[1], mean[1] / size[0])


class Draws(NamedTuple):
    """Random numbers of a gradient step."""

    t: torch.Tensor  # (B,) levels of the denoising loss
    eps: torch.Tensor  # (B, A) its noise
    own: torch.Tensor  # (T, B, A) of the actor's chain
    following: torch.Tensor  # (T, B M, A) of the chain at s', M actions per row
    coin: torch.Tensor  # () which critic the actor follows; on the device, so that nothing waits for it


def draw_step(actor: nn.Module, args: Args, device: torch.device) -> Draws:
    rows, many = args.batch_size, args.backup_actions if args.max_q_backup else 1
    return Draws(
        t=torch.randint(actor.levels, (rows,), device=device),
        eps=torch.randn(rows, actor.act_dim, device=device),
        own=draw_chain(actor, rows, device),
        following=draw_chain(actor, rows * many, device),
        coin=torch.rand((), device=device),
    )


def losses(
    nets: nn.ModuleDict, batch: Batch, draws: Draws, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of critics and actor, which share no parameter; from the parameters before the step: D110."""
    with torch.no_grad():
        q_next = next_q(nets, batch.next_obs, draws.following)
        target = td_target(batch.rewards, batch.terminations, q_next, args.gamma)
    q = nets["qf"](batch.obs, batch.actions)
    q_loss = (q - target).square().mean(1).sum()  # [Eq. 4], one mean square per critic [code]
    cloning = clone_loss(nets["actor"], batch.obs, batch.actions, draws.t, draws.eps)  # [Eq. 2]
    actions = run_chain(nets["actor"], batch.obs, draws.own)
    q_own = frozen_q(nets["qf"], batch.obs, actions)
    actor_loss = cloning + args.eta * normalised_q_loss(q_own, draws.coin)  # [Eq. 3]
    logs = {"loss/q": q_loss, "loss/bc": cloning, "loss/actor": actor_loss}
    logs |= {"q/mean": q.mean(), "q/policy": q_own.mean()}
    logs["actor/data_gap"] = (actions - batch.actions).square().mean()
    return q_loss + actor_loss, {k: v.detach() for k, v in logs.items()}


def update(nets: nn.ModuleDict, opt: torch.optim.Optimizer, loss: torch.Tensor, args: Args) -> None:
    """One gradient step, the average and the target; nothing in here waits for the GPU."""
    opt.zero_grad(set_to_none=True)
    loss.backward()  # disjoint parameters: the same as one backward per loss
    if args.grad_clip > 0:
        for name in ("actor", "qf"):  # a norm of its own for each
            nn.utils.clip_grad_norm_(nets[name].parameters(), args.grad_clip)
    opt.step()
    with torch.no_grad():
        moving = (nets.updates >= args.ema_start) & (nets.updates.remainder(args.ema_every) == 0)
        share = torch.where(moving, 1 - args.ema_decay, 0.0)
        for mine, live in zip(nets["average"].parameters(), nets["actor"].parameters(), strict=True):
            mine.lerp_(live, share.to(live))
        torch._foreach_lerp_([*nets["q_target"].parameters()], [*nets["qf"].parameters()], args.polyak)
    nets.updates.add_(1)


def make_diffql_optimizer(nets: nn.ModuleDict, args: Args, device: torch.device) -> torch.optim.Adam:
    """Adam over the denoiser at one rate, critics at the other."""
    actor = {"params": [*nets["actor"].parameters()], "lr": args.actor_lr}
    critics = {"params": [*nets["qf"].parameters()], "lr": args.qf_lr}
    return torch.optim.Adam([actor, critics], fused=True, capturable=device.type == "cuda")


@torch.no_grad()
def pick_action(nets: nn.ModuleDict, obs: torch.Tensor, candidates: int) -> torch.Tensor:
    """One of so many actions of the chain, drawn with softmax of the lower Q̂: obs (E, O) -> (E, A).  [code]"""
    actor, many = nets["actor"], obs.repeat_interleave(candidates, 0)
    actions = run_chain(actor, many, draw_chain(actor, many.shape[0], obs.device))
    q = nets["q_target"](many, actions).amin(0).view(-1, candidates)
    choice = torch.multinomial(q.softmax(1), 1)[..., None].expand(-1, 1, actions.shape[1])
    return actions.view(-1, candidates, actions.shape[1]).gather(1, choice)[:, 0]


def reward_units(args: Args, dataset: data.Dataset) -> tuple[float, float]:
    """Scale and bias of rewards in training: standardised or in units of the return range first, if so asked."""
    scale, mean = 1.0, 0.0
    if args.standardize_reward:
        mean, std = float(dataset.rewards.mean(dtype=float)), float(dataset.rewards.std(dtype=float))
        if std == 0:
            allowed = "more than one, or --no-standardize-reward"
            raise run.UsageError("rewards of the dataset", f"all {mean:g}", allowed)
        scale = 1 / std
    if args.normalize_reward:
        scale *= 1_000 / dataset.return_range()
    return args.reward_scale * scale, args.reward_bias - args.reward_scale * scale * mean


# --- end shared: diffql.learning ---


class Distiller:
    """Halves the chain of a trained actor until one step is left, in a phase before the online one: U113."""

    def __init__(self, r: run.Run, args: Args, actor: VDenoiser):
        self.r, self.args, self.actor = r, args, actor
        self.student, self.teacher = deepcopy(actor), deepcopy(actor).requires_grad_(False)
        lr = torch.tensor(args.distill_lr, device=r.device)
        capturable = r.device.type == "cuda"
        self.opt = torch.optim.Adam(self.student.parameters(), lr=lr, fused=True, capturable=capturable)
        self.count = torch.zeros((), device=r.device)  # gradient steps of the running halving
        self.loss = r.compiled(halving_loss)

    def state(self) -> dict:
        """What a checkpoint holds, by name."""
        return {f"distill_{k}": getattr(self, k) for k in ("student", "teacher", "opt", "count")}

    def halving_step(self, obs: Callable[[], torch.Tensor], updates: int) -> dict[str, torch.Tensor]:
        """One of the `updates` gradient steps of the running halving."""
        self.opt.param_groups[0]["lr"].copy_(self.args.distill_lr * (1 - self.count / updates))
        loss = self.loss(self.student, self.teacher, obs())
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        self.opt.step()
        self.count.add_(1)
        return {"loss/distill": loss.detach()}

    def restart(self) -> None:
        """The teacher is the last student, or at first the actor; the optimizer is fresh."""
        source = self.actor if self.teacher.levels == self.teacher.finest else self.student
        self.teacher.load_state_dict(source.state_dict())
        self.student.load_state_dict(source.state_dict())
        self.count.zero_()
        for state in self.opt.state.values():
            for x in state.values():
                x.zero_()

    @torch.no_grad()
    def error(self, obs: torch.Tensor) -> float:
        """Mean square between the actions of student and actor from the same noise."""
        noise = draw_chain(self.actor, len(obs), obs.device)
        return (
            (run_chain(self.student, obs, noise) - run_chain(self.actor, obs, noise)).square().mean().item()
        )

    def learn(self, obs: Callable[[], torch.Tensor]) -> None:
        """All halvings, as one phase; obs() draws states (B, O) of the dataset."""
        until = 0
        while self.student.levels > 1:
            self.teacher.levels, self.student.levels = self.student.levels, self.student.levels // 2
            updates = self.args.halving_steps * (2 if self.student.levels <= 2 else 1)
            start, until = until, until + updates
            step_fn = self.r.capture(partial(self.halving_step, obs, updates))
            for step in self.r.phase("distill", until):
                if step == start:
                    self.restart()
                self.r.log(step, step_fn())
            if self.r.once(f"halving to {self.student.levels}"):
                self.r.record(until, {"distill/error": self.error(obs())})

    def put_into(self, nets: nn.ModuleDict, opt: torch.optim.Optimizer) -> None:
        """The student takes the places of actor and average; the actor's part of the optimizer is fresh."""
        if self.r.once("distilled"):
            for name in ("actor", "average"):
                nets[name].load_state_dict(self.student.state_dict())
            for p in nets["actor"].parameters():
                for x in opt.state.get(p, {}).values():
                    x.zero_()
        nets["actor"].levels = nets["average"].levels = 1


def train(args: Args) -> dict[str, float]:
    task = data.get_task(args.env)
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    if args.distill and args.distill_from & (args.distill_from - 1):
        raise run.UsageError("--distill-from", args.distill_from, "a power of two")
    n_offline = round(args.offline_frac * args.batch_size)
    run.check_batch(args, own=args.batch_size - n_offline)
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    moments = dataset.moments() if args.normalize_obs else None
    units = data.Units(*reward_units(args, dataset), moments)
    # own rows come behind, U110, or are a buffer of their own, U143
    offline = dataset.buffer(units, r.device, args.online_steps if args.append_online else 0)
    online = offline if args.append_online else offline.like(args.online_steps)
    interaction = data.Interaction(data.make_env(task, units), online, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    nets = make_diffql_nets(task.obs_dim, task.act_dim, args).to(r.device)
    opt = make_diffql_optimizer(nets, args, r.device)

    def act(obs: torch.Tensor) -> torch.Tensor:  # stochastic, online and in evaluation: U111
        return pick_action(nets, obs, args.candidates)

    distiller = Distiller(r, args, nets["actor"]) if args.distill else None
    added = distiller.state() if distiller else {}
    r.register(nets=nets, opt=opt, online=online, interaction=interaction, **added)
    compiled_losses = r.compiled(losses)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    def gradient_step(batch: Batch) -> dict[str, torch.Tensor]:
        draws = draw_step(nets["actor"], args, r.device)
        loss, logs = compiled_losses(nets, batch, draws, args)
        update(nets, opt, loss, args)
        return logs

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        return gradient_step(offline.sample(args.batch_size))

    if args.from_offline and r.once("from_offline"):
        r.import_phase("offline", args.from_offline, offline_settings, nets=nets, opt=opt)
    step_fn = r.capture(offline_step)
    for step in r.phase("offline", args.offline_steps):
        r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 and step + 1 < args.offline_steps:
            r.record(step + 1, evaluate(act, r.device))
    if r.once("offline_end"):
        r.record(args.offline_steps, evaluate(act, r.device))
        r.export_phase("offline", offline_settings, nets=nets, opt=opt)  # all goes on: U110
        evaluate.export(act, r)

    # one step instead of many, which the online phase trains on
    if distiller:
        distiller.learn(lambda: offline.sample(args.batch_size).obs)
        distiller.put_into(nets, opt)
        if r.once("distill_end"):
            r.record(r.done["distill"], evaluate(act, r.device))

    # online: one environment step, then utd gradient steps on all rows there are
    def online_step() -> dict[str, torch.Tensor]:
        if args.append_online:
            return offline_step()
        index = offline.draw(n_offline), online.draw(args.batch_size - n_offline)
        return gradient_step(mix(offline.take(index[0]), online.take(index[1])))

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(act):
            r.record(step + 1, episode)
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
