"""WSRL: online fine-tuning of a pre-trained ensemble by SAC, without the dataset, after a warm-up of own rows.

Paper    Zhou, Peng, Li, Levine, Kumar, "Efficient Online Reinforcement Learning Fine-Tuning Need Not Retain Offline
         Data", ICLR 2025, arXiv 2412.07762; code zhouzypaul/wsrl. Pre-training: Cal-QL (Nakamoto et al., arXiv
         2303.05479v2), on locomotion CQL (Kumar et al., arXiv 2006.04779). The ensemble: REDQ (Chen et al., arXiv
         2101.05982); from scratch with half a batch from the dataset it is RLPD (Ball et al., arXiv 2302.02948).
Idea     Offline data in fine-tuning mainly keeps Q from collapsing when the policy's own states come in. So the
         pre-trained policy first collects rows while nothing learns; then a plain and fast online learner takes over.
Symbols  Q_k qf, K critics | Q̂_k q_target | Z index, critics drawn | π actor | α entropy weight softplus(raw_alpha) |
         α_cql cql_weight | α' Lagrange multiplier softplus(raw_alpha_prime) | G Monte-Carlo return
Read     Args, ENV_PRESETS, networks, losses, Monte-Carlo returns, update, train. r.phase(name, n): the steps up to n
         not done yet; r.once(name): true once.
Notes    D1 offline, all losses from the parameters before the step, as CORL; one backward, one optimizer step.
         D6 the last layer's gain is 1e-2 [Cal-QL's code].
         D7 episodes end where the file says, and online rewards get the same scale and bias.
         D80 paper: 500,000 online steps, 20 episodes every 20,000; here: 200,000 [AD2S Table 6], evaluated as in the
            other files, so that methods compare: --online-steps 500000 --eval-every 20000 --eval-episodes 20.
         D81 code cuts the large batch into consecutive parts: where it is mixed, some steps of the critics see own rows
            only. Here: every utd-th row, the same mix in each part; of rows of one kind it is the same.
         D82 code moves α by log π of new actions at s'; here: of the actions of the actor's loss, at s [SAC].
         D83 code clips the dataset's actions to ±0.99999; nothing here takes their log π, so they are as they are.
         U1 embedded tasks: sizes that finish in minutes on one CPU core; not a published setting.
         U2 returns of episodes that a time limit cut start from 0 [CORL].
         U80 tasks that WSRL lacks: Adroit (its own is the binary one, with other data) has WSRL's networks for that and
            calql.py's settings for dense rewards; Maze2D is as locomotion.
         U81 initialisation as calql.py's, orthogonal; gains of the norms 1, shifts 0, ε 1e-6 [Flax].
Metrics  loss/{q,actor,alpha}; q/mean, q/std between critics; policy/log_prob of own samples; alpha/entropy is α;
         offline cql/gap, logsumexp - Q on data, below 0 when Q is conservative; cql/bound_share of policy-action
         entries below G: 0 means Cal-QL is CQL here; alpha/lagrange is α'.
Run      python algorithms/wsrl.py --env walker2d-medium-v2 --seed 0
         data retained: --offline-frac 0.5 | --append-online | no warm-up: --warmup-steps 1024, a batch, as the code
         RLPD: --offline-steps 0 --offline-frac 0.5; on AntMaze --critic-subset 1 too
Cost     hopper-mini-v0: 190 CPU seconds on one core. Published sizes on one core: 6 offline steps, 7 online updates a
         second; GPU not measured.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, run
from common.buffer import Batch, mix
from common.run import Count, Natural, Number, Portion, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the paper's value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 250_000  # gradient steps [WSRL]
    online_steps: Natural = 200_000  # environment steps [AD2S Table 6]; WSRL 500,000: D80
    from_offline: Path | None = None  # run directory (or its offline.pt) to take the offline phase from
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it works
    compile: bool | None = None  # compile and capture the gradient step; default: on for cuda, off for cpu
    out_dir: Path = Path("runs")  # the run lives in <out-dir>/<file>/<env>/seed<seed>
    overwrite: bool = False  # start anew instead of resuming
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to the run directory, for TensorBoard
    eval_every: Count = 5_000  # steps of the running phase [DARE averages the last 4; period: CORL]: D80
    eval_episodes: Count = 10  # episodes of an evaluation [PEX, CORL]; WSRL 20: D80
    # WSRL
    batch_size: Several = 256  # transitions; of the actor and α online: utd times as many [WSRL: 1,024]
    gamma: Share = 0.99  # discount [WSRL]
    polyak: Rate = 0.005  # share of qf copied into q_target at every gradient step [WSRL]
    policy_lr: Positive = 1e-4  # Adam, actor and entropy weight [WSRL]
    critic_lr: Positive = 3e-4  # Adam, critics and Lagrange multiplier [WSRL]
    hidden: Count = 256  # width of the hidden layers [WSRL]
    critic_layers: Count = 2  # hidden layers of each critic [WSRL]; the actor has 2
    n_critics: Count = 10  # K, in the ensemble [WSRL]
    critic_subset: Count = 2  # |Z|, critics drawn for a target [WSRL, REDQ]; WSRL: for the CQL term too
    state_std: bool = True  # σ depends on the state; else one number per action dimension [WSRL: AntMaze]
    cql_weight: Weight = 5.0  # α_cql offline [WSRL]
    cql_n_actions: Count = 10  # of each of three kinds: uniform, π(s), π(s') [WSRL]
    calibrate: bool = False  # off: CQL [WSRL: locomotion]
    lagrange: bool = False  # α' learned so that the gap meets target_gap [WSRL: AntMaze]; in place of α_cql
    target_gap: Number = -1.0  # of the Lagrange variant; -1 where there is none [WSRL]
    max_target_backup: bool = True  # TD target from the best of cql_n_actions next actions [WSRL]; offline
    max_target_backup_online: bool = False  # the same online [WSRL]
    normalize_obs: bool = False  # (obs - mean) / (std + 1e-3) of the dataset [CORL]
    reward_scale: Positive = 1.0  # rewards in training: scale · r + bias [WSRL]
    reward_bias: Number = 0.0  # added to rewards in training, after scaling [WSRL]
    sparse_reward: bool = False  # an episode that never succeeds fails for ever [WSRL: AntMaze]
    # online
    warmup_steps: Natural = 5_000  # environment steps without updates, counted in online_steps [WSRL]
    utd: Count = 4  # gradient steps per environment step; of the critics, and one of actor and α [WSRL]
    offline_frac: Portion = 0.0  # share of a batch from the dataset [WSRL: none]
    append_online: bool = False  # one buffer, batches from all of it [WSRL's alternative]


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(  # [WSRL; episodes: CORL]
        offline_steps=1_000_000, critic_layers=4, state_std=False, calibrate=True, lagrange=True, target_gap=0.8,
        max_target_backup_online=True, reward_scale=10.0, reward_bias=-5.0, sparse_reward=True,
        eval_every=10_000, eval_episodes=100,
    ),
    **{k: dict(offline_steps=1_000_000, hidden=512, critic_layers=3, calibrate=True, cql_weight=1.0)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [WSRL's networks; CORL]: U80
    "maze2d-": dict(eval_episodes=100),  # as locomotion: U80
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, normalize_obs=True,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "policy_lr", "critic_lr", "hidden", "critic_layers",
    "n_critics", "critic_subset", "state_std", "cql_weight", "cql_n_actions", "calibrate", "lagrange", "target_gap",
    "max_target_backup", "normalize_obs", "reward_scale", "reward_bias", "sparse_reward",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "lagrange": ("target_gap",),
    "not lagrange": ("cql_weight",),
    "calibrate": ("sparse_reward",),
    "not append_online": ("offline_frac",),
}


# --- shared: wsrl.networks ---
def orthogonal(sizes: tuple, gains: list[float], copies: int) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Weights (copies, in, out) orthogonal with the layer's gain, biases (copies, 1, out) zero.  [CORL]"""
    weights = [torch.empty(copies, i, o) for i, o in pairwise(sizes)]
    for weight, gain in zip(weights, gains, strict=True):
        for k in range(copies):
            nn.init.orthogonal_(weight[k], gain)
    return nn.ParameterList(weights), nn.ParameterList([torch.zeros(copies, 1, o) for o in sizes[1:]])


def normed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """ReLU(LayerNorm(x W + b)) of K networks: (K, B, in), (K, in, H), three of (K, 1, H) -> (K, B, H).  [WSRL]"""
    x = F.layer_norm(torch.baddbmm(bias, x, weight), bias.shape[-1:], eps=1e-6)  # U81
    return F.relu(torch.addcmul(shift, x, gain))


def norms(hidden: int, layers: int, copies: int) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Gains and shifts of the LayerNorms, (copies, 1, hidden) each."""
    gains = [torch.ones(copies, 1, hidden) for _ in range(layers)]
    return nn.ParameterList(gains), nn.ParameterList([torch.zeros_like(x) for x in gains])


class NormedEnsembleQ(nn.Module):
    """K critics as stacked weights, one batched matmul per layer: obs (B, O), actions (B, A) -> (K, B).  [WSRL]"""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, layers: int, copies: int):
        super().__init__()
        gains = [math.sqrt(2)] * layers + [1e-2]  # D6
        self.weight, self.bias = orthogonal((obs_dim + act_dim, *[hidden] * layers, 1), gains, copies)
        self.gain, self.shift = norms(hidden, layers, copies)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        *weights, weight_out = self.weight
        *biases, bias_out = self.bias
        x = torch.cat([obs, actions], -1).expand(len(weight_out), -1, -1)
        for layer in zip(weights, biases, self.gain, self.shift, strict=True):
            x = normed(x, *layer)
        return torch.baddbmm(bias_out, x, weight_out).squeeze(-1)


class NormedActor(nn.Module):
    """π(a|s) = tanh N(mean(s), σ²), two normed layers: obs (B, O) -> mean, log_std (B, A), before the squash.  [WSRL]

    σ is a function of the state, or one parameter per action dimension, 1 at first; clipped to [1e-5, 10].
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, state_std: bool):
        super().__init__()
        outputs = 2 * act_dim if state_std else act_dim
        gains = [math.sqrt(2)] * 2 + [1e-2]  # D6
        self.weight, self.bias = orthogonal((obs_dim, hidden, hidden, outputs), gains, 1)
        self.gain, self.shift = norms(hidden, 2, 1)
        self.log_std = None if state_std else nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *weights, weight_out = self.weight
        *biases, bias_out = self.bias
        x = obs[None]
        for layer in zip(weights, biases, self.gain, self.shift, strict=True):
            x = normed(x, *layer)
        mean = torch.baddbmm(bias_out, x, weight_out)[0]
        if self.log_std is None:
            mean, log_std = mean.chunk(2, -1)
        else:
            log_std = self.log_std.expand_as(mean)
        return mean, log_std.clamp(math.log(1e-5), math.log(10.0))


def squash(mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Action tanh(u), u = mean + σ · noise, and log π(action): all (..., A) -> (..., A), (...,).

    log π = Σ log N(u) - log(1 - tanh² u), with log(1 - tanh² u) = 2 (ln 2 - u - softplus(-2u)).  [SAC App. C]
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return torch.tanh(u), (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


def make_wsrl_nets(
    obs_dim: int, act_dim: int, hidden: int, critic_layers: int, n_critics: int, state_std: bool
) -> nn.ModuleDict:
    """actor, qf, q_target (a frozen copy of qf); `weights`, whose softplus is α and α', 1 at first."""
    nets, one = nn.ModuleDict(), math.log(math.e - 1)
    nets["actor"] = NormedActor(obs_dim, act_dim, hidden, state_std)
    nets["qf"] = NormedEnsembleQ(obs_dim, act_dim, hidden, critic_layers, n_critics)
    nets["q_target"] = NormedEnsembleQ(obs_dim, act_dim, hidden, critic_layers, n_critics)
    nets["weights"] = nn.ParameterDict({k: torch.tensor(one) for k in ("raw_alpha", "raw_alpha_prime")})
    nets["q_target"].load_state_dict(nets["qf"].state_dict())
    nets["q_target"].requires_grad_(False)
    return nets


# --- end shared: wsrl.networks ---


# --- shared: wsrl.losses ---
def q_of_drawn(qf: nn.Module, index: torch.Tensor, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Q of M actions per state by the critics `index` (S,) alone: obs (B, O), actions (B, M, A) -> (S, B, M).

    The official code evaluates all and then draws: the same numbers, five times the work. A critic drawn twice counts
    twice. On a CPU some states at a time, so that what lies between the layers stays in its cache.
    """
    drawn = {k: p.index_select(0, index) for k, p in qf.named_parameters()}
    rows, many, _ = actions.shape
    states = rows if actions.is_cuda else max(2_048 // many, 1)
    parts = [
        torch.func.functional_call(qf, drawn, (o.repeat_interleave(many, 0), a.flatten(0, 1)))
        for o, a in zip(obs.split(states), actions.split(states), strict=True)
    ]
    return torch.cat(parts, 1).view(-1, rows, many)


def frozen_q(qf: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """qf(obs, actions) (K, B) with gradients to the actions but none to the critic."""
    weights = {k: p.detach() for k, p in qf.named_parameters()}
    return torch.func.functional_call(qf, weights, (obs, actions))


def td_loss(
    nets: nn.ModuleDict, batch: Batch, noise: torch.Tensor, index: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over critics and rows of (Q_k - y)², y = r + γ (1 - terminated) max_a min_{k in Z} Q̂_k(s', a).

    noise (B, M, A) N(0, I) for the M actions of π(s'), one without the max-target backup; index (S,) is Z; no entropy
    term [WSRL] -> loss (), Q (K, B).  [REDQ Alg. 1]
    """
    with torch.no_grad():
        mean, log_std = nets["actor"](batch.next_obs)
        actions, _ = squash(mean[:, None], log_std[:, None], noise)
        q_next = q_of_drawn(nets["q_target"], index, batch.next_obs, actions).amin(0).amax(-1)
        target = batch.rewards + gamma * (1 - batch.terminations) * q_next
    q = nets["qf"](batch.obs, batch.actions)
    return (q - target).square().mean(), q


def critic_losses(
    nets: nn.ModuleDict, batch: Batch, noise: torch.Tensor, index: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of an online step of the critics, and its logs; as td_loss."""
    loss, q = td_loss(nets, batch, noise, index, gamma)
    logs = {"loss/q": loss, "q/mean": q.mean(), "q/std": q.std(0, correction=0).mean()}
    return loss, {k: v.detach() for k, v in logs.items()}


def policy_losses(
    nets: nn.ModuleDict, obs: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of E[α log π - min over all K of Q_k] and of α's loss, which share no parameter.  [SAC §4.2, §5]"""
    mean, log_std = nets["actor"](obs)
    actions, log_pi = squash(mean, log_std, noise)
    alpha = F.softplus(nets["weights"]["raw_alpha"])
    q = frozen_q(nets["qf"], obs, actions).amin(0)
    actor_loss = (alpha.detach() * log_pi - q).mean()
    missing = log_pi.detach() - noise.shape[-1]  # of the target entropy, -A; at s: D82
    alpha_loss = -(alpha * missing).mean()
    logs = {"loss/actor": actor_loss, "loss/alpha": alpha_loss, "alpha/entropy": alpha}
    logs |= {"policy/log_prob": log_pi.mean()}
    return actor_loss + alpha_loss, {k: v.detach() for k, v in logs.items()}


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


def losses(
    nets: nn.ModuleDict, batch: Batch, bound: torch.Tensor | None, draws: tuple[torch.Tensor, ...], args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Offline: sum of the losses of critics, actor, α and α', which share no parameter; from the old parameters: D1.

    bound (B,) Monte-Carlo returns or None; draws as from draw_offline.
    """
    for_target, for_gap, uniform, policy_noise, backup_noise, actor_noise = draws
    rows, n, act_dim = uniform.shape
    td, q = td_loss(nets, batch, backup_noise, for_target, args.gamma)
    with torch.no_grad():  # n of π(s), n of π(s')
        of_both = nets["actor"](torch.cat([batch.obs, batch.next_obs]))
        means, log_stds = (torch.stack(x.split(rows), 1).repeat_interleave(n, 1) for x in of_both)
        sampled, sampled_log_prob = squash(means, log_stds, policy_noise)
        log_uniform = torch.full((rows, n), -act_dim * math.log(2), device=sampled.device)
        log_probs = torch.cat([log_uniform, sampled_log_prob], 1)
    q_sampled = q_of_drawn(nets["qf"], for_gap, batch.obs, torch.cat([uniform, sampled], 1))  # (S, B, 3n)
    gap, share = conservative_gap(q_sampled, q.index_select(0, for_gap), log_probs, bound, -math.inf)
    alpha_prime, lagrange_loss = F.softplus(nets["weights"]["raw_alpha_prime"]), 0.0
    if args.lagrange:  # α' in place of α_cql
        cql_loss = (alpha_prime.detach() * (gap - args.target_gap)).mean()
        lagrange_loss = -(alpha_prime * (gap.detach() - args.target_gap)).mean()
    else:
        cql_loss = args.cql_weight * gap.mean()
    policy_loss, logs = policy_losses(nets, batch.obs, actor_noise)
    logs |= {"loss/q": td, "q/mean": q.mean(), "q/std": q.std(0, correction=0).mean(), "cql/gap": gap.mean()}
    logs |= {"cql/bound_share": share, "alpha/lagrange": alpha_prime}
    return td + cql_loss + lagrange_loss + policy_loss, {k: v.detach() for k, v in logs.items()}


# --- end shared: wsrl.losses ---


# --- shared: wsrl.returns ---
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


# --- end shared: wsrl.returns ---


# --- shared: wsrl.update ---
def draw_critics(args: Args, device: torch.device) -> torch.Tensor:
    """Z for a target or a CQL term, (S,), uniform with replacement.  [REDQ Alg. 1; replacement: official code]"""
    return torch.randint(args.n_critics, (args.critic_subset,), device=device)


def draw_offline(args: Args, act_dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """For an offline step: two draws of critics (S,), uniform actions (B, n, A), and N(0, I).

    The latter for n actions of π(s) and n of π(s') (B, 2n, A), for the backup (B, M, A), for the actor's loss (B, A).
    """
    rows, n = args.batch_size, args.cql_n_actions
    index = draw_critics(args, device), draw_critics(args, device)
    uniform = torch.rand(rows, n, act_dim, device=device) * 2 - 1
    backups = n if args.max_target_backup else 1
    shapes = (rows, 2 * n, act_dim), (rows, backups, act_dim), (rows, act_dim)
    return *index, uniform, *(torch.randn(shape, device=device) for shape in shapes)


def make_wsrl_optimizer(
    nets: nn.ModuleDict, policy_lr: float, critic_lr: float, device: torch.device
) -> torch.optim.Adam:
    """Adam over actor and α at one rate, critics and α' at the other; a step passes over what has no gradient."""
    weights = nets["weights"]
    policy = {"params": [*nets["actor"].parameters(), weights["raw_alpha"]], "lr": policy_lr}
    critic = {"params": [*nets["qf"].parameters(), weights["raw_alpha_prime"]], "lr": critic_lr}
    return torch.optim.Adam([policy, critic], fused=True, capturable=device.type == "cuda")


# --- end shared: wsrl.update ---


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


# --- shared: wsrl.utd ---
def update(
    nets: nn.ModuleDict, opt: torch.optim.Optimizer, batch: Batch, of_critics, of_policy, args: Args
) -> dict[str, torch.Tensor]:
    """Online: utd steps of critics and targets, each on its part of the batch, then one of actor and α on all of it.

    of_critics and of_policy are critic_losses and policy_losses, compiled or not. Nothing in here waits for the GPU.
    [RLPD Alg. 1]
    """
    act_dim, device = batch.actions.shape[1], batch.actions.device
    backups = args.cql_n_actions if args.max_target_backup_online else 1
    for k in range(args.utd):
        part = Batch(*(x[k :: args.utd] for x in batch))  # D81
        noise = torch.randn(len(part.rewards), backups, act_dim, device=device)
        loss, logs = of_critics(nets, part, noise, draw_critics(args, device), args.gamma)
        learn(opt, loss)
        follow(nets, args.polyak)
    loss, policy_logs = of_policy(nets, batch.obs, torch.randn_like(batch.actions))
    learn(opt, loss)
    return logs | policy_logs


# --- end shared: wsrl.utd ---


def train(args: Args) -> dict[str, float]:
    task = data.get_task(args.env)
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    n_rows = args.utd * args.batch_size  # of an online batch
    n_offline = 0 if args.append_online else round(args.offline_frac * n_rows)
    wanted = dict(dataset=n_offline) if args.offline_frac and not args.append_online else {}
    run.check_batch(args, own=n_rows - n_offline, **wanted)
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    moments = dataset.moments() if args.normalize_obs else None
    units = data.Units(args.reward_scale, args.reward_bias, moments)
    room = args.online_steps if args.append_online else 0
    offline = dataset.buffer(units, r.device, room)  # actions unclipped: D83
    online = offline if args.append_online else offline.like(args.online_steps)
    returns = None  # G of the dataset's rows
    if args.calibrate:
        failure = args.reward_bias if args.sparse_reward else None  # training reward of a raw 0
        g = mc_returns(units.rewards(dataset.rewards), dataset.ends, args.gamma, failure)
        returns = torch.from_numpy(g).to(r.device)
    interaction = data.Interaction(data.make_env(task, units), online, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    sizes = args.hidden, args.critic_layers, args.n_critics, args.state_std
    nets = make_wsrl_nets(task.obs_dim, task.act_dim, *sizes).to(r.device)
    opt = make_wsrl_optimizer(nets, args.policy_lr, args.critic_lr, r.device)

    @torch.no_grad()
    def act(obs: torch.Tensor) -> torch.Tensor:  # deterministic
        return torch.tanh(nets["actor"](obs)[0])

    @torch.no_grad()
    def explore(obs: torch.Tensor) -> torch.Tensor:
        mean, log_std = nets["actor"](obs)
        return squash(mean, log_std, torch.randn_like(mean))[0]

    r.register(nets=nets, opt=opt, online=online, interaction=interaction)
    compiled_losses = r.compiled(losses)
    of_critics, of_policy = r.compiled(critic_losses), r.compiled(policy_losses)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        index = offline.draw(args.batch_size)
        bound = returns[index] if args.calibrate else None
        draws = draw_offline(args, task.act_dim, r.device)
        loss, logs = compiled_losses(nets, offline.take(index), bound, draws, args)
        learn(opt, loss)
        follow(nets, args.polyak)
        return logs

    if args.from_offline and r.once("from_offline"):
        r.import_phase("offline", args.from_offline, offline_settings, nets=nets, opt=opt)
    step_fn = r.capture(offline_step)
    for step in r.phase("offline", args.offline_steps):
        r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 and step + 1 < args.offline_steps:
            r.record(step + 1, evaluate(act, r.device))
    if r.once("offline_end"):
        r.record(args.offline_steps, evaluate(act, r.device))
        r.export_phase("offline", offline_settings, nets=nets, opt=opt)  # the optimizer goes on [WSRL]
        evaluate.export(act, r)

    # online: one environment step, then utd steps of the critics and one of the actor, on own rows alone
    def online_step() -> dict[str, torch.Tensor]:
        batch = online.sample(n_rows - n_offline)
        if n_offline:  # the alternative
            batch = mix(batch, offline.sample(n_offline))
        return update(nets, opt, batch, of_critics, of_policy, args)

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
        if step >= args.warmup_steps:  # before, the pre-trained policy collects [WSRL Alg. 1]
            r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act, r.device))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
