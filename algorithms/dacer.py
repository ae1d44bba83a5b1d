"""DACER, started from Diffusion-QL: noise on the actions of the chain, its scale by the entropy of the policy.

Paper    Wang et al., "Diffusion Actor-Critic with Entropy Regulator", NeurIPS 2024, arXiv 2405.15177, an online method,
         and its public code: [DACER]. DUAL (Bui et al., arXiv 2605.30776v1) starts it from its Diff-QL; how is left
         open there. Backbone: diffql.py, line for line outside the NEW parts; Eq. and [code] are Diffusion-QL's.
Idea     The density of what a chain draws is unknown, so its entropy is that of a Gaussian mixture fitted to samples.
         All the policy's actions get noise c α ξ; too much entropy lowers α, too little raises it.
Symbols  those of diffql.py | ξ ~ N(0, I) | α exp(log_alpha) | c noise_scale | Ĥ entropy, of a mixture with weights w_k
         and covariances Σ_k | H̄ entropy_target · A
Read     Args; NEW: the mixture (m_step, e_step, fit_mixture, mixture_entropy), the noise, dacer_losses; train.
         From diffql.py: Denoiser, noisy_chain, bc_loss, MishTwinQ, losses (offline), update, pick_action.
Notes    D110, D111, D112, D113, U110, U111, U112, U1 as in diffql.py; its other chain, for --distill, is left out.
         D130 DACER maximises the mean of the lower Q alone: no cloning; T is 20, critics are distributional, rates
            1e-4, policy and targets move every second step, rewards are times 0.2. DUAL's DACER is its Diff-QL with the
            entropy, so losses, networks and rates are Diffusion-QL's here; --cloning-online 0 leaves out the cloning.
         D131 DUAL estimates the entropy at each online step, DACER's code every 10,000th gradient step on its batch;
            here every 10,000th environment step, the first after the warm-up, on states of the whole buffer.
         D132 the code has scikit-learn's mixtures, one after the other, until they settle; here 50 steps of EM from
            k-means++ seeds, of all states at once. Covariances have the same floor, 1e-6.
         U130 noise is where the code has it: on actions in the environment, in targets and in the actor's loss; the
            box clips it. Targets keep the average's chain, and evaluation has no noise.
         U131 the noise comes on top of the action that Diffusion-QL picks of its candidates (DACER has one); Ĥ is of
            the chain's actions with noise, not of picked ones.
         U132 the regulator's settings: the code's, c = 0.1 but for HalfCheetah (and Humanoid), where it has 0.15. The
            embedded tasks have as many steps of α in their 4,000 updates as 1M have, from α = 1, where the noise alone
            has the entropy H̄: final score 80.6 on Reacher, from α = 3 77.9, Diffusion-QL 77.0 (seed 100).
Metrics  those of diffql.py, losses online of actions with noise; dacer/entropy Ĥ goes towards H̄ if the box leaves room;
         dacer/alpha α; dacer/std c α.
Run      python algorithms/dacer.py --env hopper-medium-v2 --seed 0
         the common start: --from-offline runs/diffql/hopper-medium-v2/seed0
         DACER's loss of the actor: --cloning-online 0 | noise that is not regulated: --alpha-lr 0
Cost     as diffql.py; an estimate of the entropy takes 3 CPU seconds at published sizes, 0.1 on the mini tasks.
Fails    where the cloned chain alone has more entropy than H̄ (Reacher: -1.0 beside -1.8), α falls as long as the run
         lasts, and little is left of the noise.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, run
from common.buffer import Batch
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
    # NEW: DACER, online only
    cloning_online: Weight = 1.0  # of the denoising loss beside Q online; 0 is DACER's own loss: D130
    noise_scale: Positive = 0.1  # c, unit of the noise that α multiplies [DACER]: U132
    alpha_start: Positive = 3.0  # α at the start of the online phase [DACER]
    alpha_lr: Weight = 3e-2  # Adam, log α [DACER]
    alpha_every: Count = 10_000  # environment steps from one step of α to the next: D131
    entropy_target: Number = -0.9  # H̄ per action dimension [DACER]
    entropy_states: Count = 256  # states that the entropy is the mean of [DACER: its batch]
    entropy_samples: Several = 200  # actions per state that a mixture is fitted to [DACER]
    mixture_components: Count = 3  # Gaussians of a mixture [DACER]
    em_steps: Natural = 50  # of a mixture's fit: D132


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    # [code, per task]; robots' rows are those of medium, which others go by: U112
    "halfcheetah-": dict(noise_scale=0.15),  # [DACER's code]: U132
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
        normalize_obs=True, normalize_reward=True,
        alpha_start=1.0, alpha_every=40, entropy_states=32,  # U132
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "actor_lr", "qf_lr", "hidden",
    "denoise_steps", "eta", "max_q_backup", "backup_actions",
    "grad_clip", "ema_decay", "ema_start", "ema_every",
    "normalize_obs", "normalize_reward", "standardize_reward", "reward_scale", "reward_bias",
)  # fmt: skip
PLAIN_CHAIN = dict(distill=False, distill_from=8)  # what a checkpoint of diffql.py says of its chain
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "max_q_backup": ("backup_actions",)
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

run_chain, clone_loss = noisy_chain, bc_loss  # diffql.py chooses by the actor; here there is one kind


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


def make_chain_nets(obs_dim: int, act_dim: int, args: Args) -> nn.ModuleDict:
    """actor, average (of it), qf, q_target (a frozen copy of qf); `updates`, how many, is a buffer beside them."""
    nets = nn.ModuleDict()
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


# NEW: the entropy of a policy that can only be sampled: a Gaussian mixture for each state, of all states at once.


class Mixture(NamedTuple):
    """Gaussian mixtures of S states, K components each."""

    weight: torch.Tensor  # (S, K), sums to 1
    mean: torch.Tensor  # (S, K, A)
    chol: torch.Tensor  # (S, K, A, A) lower triangular, Σ = chol cholᵀ


def m_step(x: torch.Tensor, share: torch.Tensor, floor: float = 1e-6) -> Mixture:
    """The likeliest mixture if component k has the part share[:, :, k] of each sample: x (S, N, A), share (S, N, K)."""
    size = share.sum(1) + 1e-12  # a component may be left with nothing
    mean = share.mT @ x / size[..., None]
    off = x[:, None] - mean[:, :, None]  # (S, K, N, A)
    cov = (share.mT[..., None] * off).mT @ off / size[..., None, None]
    chol, _ = torch.linalg.cholesky_ex(cov + floor * torch.eye(x.shape[-1]).to(x))  # waits for nobody's check
    return Mixture(size / x.shape[1], mean, chol)


def half_log_det(mixture: Mixture) -> torch.Tensor:
    """log |Σ| / 2 (S, K)."""
    return mixture.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def e_step(x: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """P(k | x) of each sample (S, N, K), by Bayes from w_k N(x; mean_k, Σ_k); x (S, N, A)."""
    off = x[:, None] - mixture.mean[:, :, None]
    white = torch.linalg.solve_triangular(mixture.chol, off.mT, upper=False)  # (S, K, A, N)
    log_p = mixture.weight.log() - half_log_det(mixture)
    return (log_p[..., None] - 0.5 * white.square().sum(-2)).softmax(1).mT


def seed_shares(x: torch.Tensor, components: int) -> torch.Tensor:
    """Each sample is its nearest seed's: 0 or 1 (S, N, K). Seeds are drawn from the samples x (S, N, A) by k-means++.

    That is, with chances as the squared distances to the nearest seed so far.
    """
    distances: list[torch.Tensor] = []
    chance = torch.ones_like(x[..., 0])
    for _ in range(components):
        seed = x.take_along_dim(torch.multinomial(chance, 1)[..., None], 1)
        distances.append((x - seed).square().sum(-1))
        chance = torch.stack(distances).amin(0).clamp(min=1e-30)  # all 0 if the samples are one point
    nearest = torch.stack(distances, -1).argmin(-1, keepdim=True)
    return (nearest == torch.arange(components, device=x.device)).to(x)


def fit_mixture(x: torch.Tensor, components: int, steps: int) -> Mixture:
    """EM on samples x (S, N, A), in float64: D132. Draws its seeds."""
    x = x.double()  # samples that the box has clipped lie on a plane, and Σ is as flat as its floor
    mixture = m_step(x, seed_shares(x, components))
    for _ in range(steps):
        mixture = m_step(x, e_step(x, mixture))
    return mixture


def mixture_entropy(mixture: Mixture) -> torch.Tensor:
    """Ĥ = -Σ w log w + Σ w (A log 2πe + log |Σ|) / 2 (S,): exact if components do not overlap, else above.  [DACER]"""
    of_gaussians = 0.5 * mixture.mean.shape[-1] * math.log(2 * math.pi * math.e) + half_log_det(mixture)
    return (torch.special.entr(mixture.weight) + mixture.weight * of_gaussians).sum(-1)


# NEW: noise on the policy's actions, and the regulator of its scale.


def perturbed(actions: torch.Tensor, std: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    """a + c α ξ in the box: actions, ξ (B, A), std = c α ().  [DACER]: U130"""
    return (actions + std * xi).clamp(-1, 1)


@torch.no_grad()
def policy_entropy(actor: nn.Module, obs: torch.Tensor, std: torch.Tensor, args: Args) -> torch.Tensor:
    """Mean Ĥ () over states obs (S, O), each from entropy_samples actions of the chain with noise.  [DACER]: U131"""
    many = obs.repeat_interleave(args.entropy_samples, 0)
    actions = run_chain(actor, many, draw_chain(actor, len(many), obs.device))
    actions = perturbed(actions, std, torch.randn_like(actions)).view(len(obs), args.entropy_samples, -1)
    return mixture_entropy(fit_mixture(actions, args.mixture_components, args.em_steps)).mean()


class Regulator(nn.Module):
    """log α with its Adam step; the noise has the standard deviation c α."""

    def __init__(self, act_dim: int, args: Args):
        super().__init__()
        self.scale, self.target = args.noise_scale, args.entropy_target * act_dim
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha_start)))

    def std(self) -> torch.Tensor:
        return self.scale * self.log_alpha.detach().exp()

    def loss(self, entropy: torch.Tensor) -> torch.Tensor:
        """log α (Ĥ - H̄): its descent lowers α where the entropy is above the target.  [DACER]"""
        return self.log_alpha * (entropy - self.target)

    def told(self, entropy: torch.Tensor) -> dict[str, float]:
        """What is logged; waits for the device."""
        alpha = self.log_alpha.exp().item()
        return {"dacer/entropy": entropy.item(), "dacer/alpha": alpha, "dacer/std": self.scale * alpha}


def regulate(regulator: Regulator, opt: torch.optim.Optimizer, entropy: torch.Tensor) -> None:
    """One step of α from Ĥ ()."""
    opt.zero_grad(set_to_none=True)
    regulator.loss(entropy.to(regulator.log_alpha)).backward()
    opt.step()


class Xi(NamedTuple):
    """ξ of a gradient step."""

    own: torch.Tensor  # (B, A) for the actor's actions
    following: torch.Tensor  # (B M, A) for those at s'


def draw_xi(draws: Draws) -> Xi:
    return Xi(torch.randn_like(draws.own[0]), torch.randn_like(draws.following[0]))


def next_q_with_noise(
    nets: nn.ModuleDict, next_obs: torch.Tensor, noise: torch.Tensor, std: torch.Tensor, xi: torch.Tensor
) -> torch.Tensor:
    """next_q, of actions with noise: ξ (B M, A).  [DACER]: U130"""
    many = noise.shape[1] // len(next_obs)
    actions = run_chain(nets["average"], next_obs.repeat_interleave(many, 0), noise)
    actions = perturbed(actions, std, xi)
    q = q_of_many(nets["q_target"], next_obs, actions.view(len(next_obs), many, -1))  # (2, B, M)
    return q.amax(-1).amin(0)


def dacer_losses(
    nets: nn.ModuleDict, std: torch.Tensor, batch: Batch, draws: Draws, xi: Xi, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`losses` of actions with noise, the cloning weighted: D130; std = c α () is a constant here, as in [DACER]."""
    with torch.no_grad():
        q_next = next_q_with_noise(nets, batch.next_obs, draws.following, std, xi.following)
        target = td_target(batch.rewards, batch.terminations, q_next, args.gamma)
    q = nets["qf"](batch.obs, batch.actions)
    q_loss = (q - target).square().mean(1).sum()  # [Eq. 4], at a' with noise
    cloning = clone_loss(nets["actor"], batch.obs, batch.actions, draws.t, draws.eps)  # [Eq. 2]
    actions = run_chain(nets["actor"], batch.obs, draws.own)
    q_own = frozen_q(nets["qf"], batch.obs, perturbed(actions, std, xi.own))
    actor_loss = args.cloning_online * cloning + args.eta * normalised_q_loss(
        q_own, draws.coin
    )  # [Eq. 3]: D130
    logs = {"loss/q": q_loss, "loss/bc": cloning, "loss/actor": actor_loss}
    logs |= {"q/mean": q.mean(), "q/policy": q_own.mean()}
    logs["actor/data_gap"] = (actions - batch.actions).square().mean()
    return q_loss + actor_loss, {k: v.detach() for k, v in logs.items()}


# end of NEW


def train(args: Args) -> dict[str, float]:
    task = data.get_task(args.env)
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    moments = dataset.moments() if args.normalize_obs else None
    units = data.Units(*reward_units(args, dataset), moments)
    offline = online = dataset.buffer(units, r.device, args.online_steps)  # own rows come behind: U110
    interaction = data.Interaction(data.make_env(task, units), online, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    nets = make_chain_nets(task.obs_dim, task.act_dim, args).to(r.device)
    opt = make_diffql_optimizer(nets, args, r.device)
    regulator = Regulator(task.act_dim, args).to(r.device)  # NEW
    alpha_opt = torch.optim.Adam(regulator.parameters(), args.alpha_lr)  # NEW

    def act(obs: torch.Tensor) -> torch.Tensor:  # stochastic in evaluation, too: U111
        return pick_action(nets, obs, args.candidates)

    def explore(obs: torch.Tensor) -> torch.Tensor:
        actions = act(obs)
        return perturbed(actions, regulator.std(), torch.randn_like(actions))  # NEW: U131

    added = dict(regulator=regulator, alpha_opt=alpha_opt)  # NEW
    r.register(nets=nets, opt=opt, online=online, interaction=interaction, **added)
    compiled_losses = r.compiled(losses)
    offline_settings = r.settings(OFFLINE_SETTINGS) | PLAIN_CHAIN

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

    # online: one environment step, then utd gradient steps
    compiled_dacer_losses = r.compiled(dacer_losses)

    def online_step() -> dict[str, torch.Tensor]:  # NEW
        batch, draws = offline.sample(args.batch_size), draw_step(nets["actor"], args, r.device)
        loss, logs = compiled_dacer_losses(nets, regulator.std(), batch, draws, draw_xi(draws), args)
        update(nets, opt, loss, args)
        return logs

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
        if step >= args.warmup_steps:
            if (step - args.warmup_steps) % args.alpha_every == 0:  # NEW: D131
                obs = offline.sample(args.entropy_states).obs
                entropy = policy_entropy(nets["actor"], obs, regulator.std(), args)
                regulate(regulator, alpha_opt, entropy)
                r.record(step + 1, regulator.told(entropy))
            for _ in range(args.utd):
                logs = step_fn()
            r.log(step, logs)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act, r.device))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
