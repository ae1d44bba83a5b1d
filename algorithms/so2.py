"""SO2 + OFF2ON: critics that each follow a perturbed target of their own, on rows that look like the policy's.

Paper    Zhang et al., "A Perspective of Q-value Estimation on Offline-to-Online Reinforcement Learning" (SO2), AAAI
         2024, arXiv 2312.07685, code opendilab/SO2; Lee et al., "Offline-to-Online Reinforcement Learning via Balanced
         Replay and Pessimistic Q-Ensemble" (OFF2ON), CoRL 2021, arXiv 2107.00591, code shlee94/Off2OnRL. DUAL combines
         them: U100.
Idea     An offline Q is wrong by amounts that differ between actions. Targets at noisy actions even these out, and ten
         updates per step correct them before the policy follows them; pessimism is in the actor alone, which sees the
         least of all critics. Rows are drawn in proportion to how much they look like the policy's own.
Symbols  Q_k qf, K critics | Q̂_k q_target | π actor | α entropy weight | α_cql cql_weight | ε perturbation of a' |
         w(s, a) density ratio of own rows to the dataset's: the net `ratio` is log w | f own_frac
Read     Args, ENV_PRESETS, networks, targets and losses, balanced replay, update, train
Notes    D1 offline, all losses from the parameters before the step; one backward, one optimizer step.
         D2 TD loss is a sum of MSEs, one per critic, not half of it: α_cql goes with that, as in calql.py. SO2 has the
            mean over the critics, which is the same to Adam.
         D5 log π of the data is that of the data's action; it is only logged. D6 the last layer's gain is 1e-2.
         D92 networks and their start are calql.py's (orthogonal; log σ is a trained scale and offset of the output).
         D100 offline is CQL, OFF2ON's; SO2 starts from checkpoints of EDAC. The targets are independent there too.
         D101 one actor, trained against the least of all critics [SO2]; OFF2ON has five, moment-matched to one
            Gaussian, each from its own twin critics, and takes the mean over the pairs of the less of two.
         D102 w is the exponential of the net; the code's is a ReLU, which can die. Both are 1 at the start.
         D103 10 critics on Hopper too, where SO2 has 50: EDAC's only pessimism there is their number, CQL has its own.
         D104 updates follow every environment step; OFF2ON's come in blocks of 1,000 after as many steps, the first
            block ten times. An own row enters with the priority at which the warm-up's are f of the first draws.
         D105 evaluations as in every file; SO2's every 1,000 gradient steps, over 8 episodes.
         U1 embedded tasks: sizes for minutes on one core, 2 updates of the critics per step; α by task; unpublished.
         U100 DUAL does not say how it combines them: here OFF2ON's replay (256 rows), SO2's noise, independent targets
            and 10 updates of the critics to one of the actor. With --no-balanced-replay SO2 alone: 256 own rows and
            2,304 of all. Ratio, loss and draw are OFF2ON's: one ratio step per step of the critics.
         U101 AntMaze, Adroit, Maze2D: neither paper nor DUAL has this backbone there; the same settings.
         U102 α is learned offline [OFF2ON] and fixed online [SO2]; the targets have the entropy term in both phases, so
            that Q means the same across the switch. Optimizers start anew there, at SO2's rates.
Metrics  loss/{q,actor,alpha,ratio}; loss/ratio 1.39: the buffers look alike; q/mean; q/spread between critics; offline
         cql/gap, logsumexp - Q on data; alpha/entropy is α; policy/log_prob, policy/data_log_prob; online
         replay/own_share of a batch, replay/w_dataset, mean w on the dataset, 1 if it is a ratio.
Run      python algorithms/so2.py --env hopper-medium-v2 --seed 0
         SO2 alone: --no-balanced-replay | targets without noise: --no-perturbation | as in DUAL: --online-steps 1000000
Cost     Published sizes on one core: one offline step a second, 1.4 environment steps of 10 updates; the draw is 0.3 ms
         of an update with 2M rows. reacher-mini-v0: two CPU minutes. GPU not measured.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, run
from common.buffer import Batch, ReplayBuffer
from common.run import Count, Fraction, Natural, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [OFF2ON]
    online_steps: Natural = 150_000  # environment steps [SO2]; OFF2ON 250,000; DUAL 1,000,000
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
    hidden: Count = 256  # width of the hidden layers [SO2, OFF2ON]
    critic_layers: Count = 3  # hidden layers of each critic [SO2; the actor has 3 too]; OFF2ON 2
    n_critics: Count = 10  # K, in the ensemble [SO2; OFF2ON: five pairs]: D103
    cql_weight: Weight = 5.0  # α_cql offline [CQL's code]; online there is none [SO2, OFF2ON]
    cql_n_actions: Count = 10  # of each of three kinds: uniform, π(s), π(s') [CORL]
    normalize_obs: bool = False  # (obs - mean) / (std + 1e-3) of the dataset [CORL]; not in SO2, OFF2ON
    # online
    warmup_steps: Natural = 5_000  # environment steps without updates, counted in online_steps [SO2]
    utd: Count = 10  # gradient steps per environment step [SO2]; of the critics, and one of the actor
    policy_lr_online: Positive = 1e-3  # Adam, actor online [SO2]
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


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(eval_every=10_000, eval_episodes=100),  # [CORL]; no table has it there: U101
    "maze2d-": dict(eval_episodes=100),  # [CORL]
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128, mixed_rows=1_152,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, normalize_obs=True, utd=2,
        n_critics=5, ratio_hidden=64, ratio_batch=128, ratio_lr=1e-3, policy_lr_online=3e-4,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50, cql_weight=2.0, entropy_weight=0.01),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "policy_lr", "critic_lr", "hidden", "critic_layers",
    "n_critics", "cql_weight", "cql_n_actions", "normalize_obs",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "perturbation": ("perturbation_std", "perturbation_clip"),
    "balanced_replay": ("own_frac", "ratio_batch", "ratio_lr", "ratio_hidden", "ratio_temperature"),
    "not balanced_replay": ("mixed_rows",),
}


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


def make_so2_nets(
    obs_dim: int, act_dim: int, hidden: int, critic_layers: int, n_critics: int
) -> nn.ModuleDict:
    """actor, qf, q_target (a frozen copy of qf), and log_alpha as the parameter of `weights`."""
    nets = nn.ModuleDict()
    nets["actor"] = TanhGaussianActor(obs_dim, act_dim, hidden)
    nets["qf"] = EnsembleQ(obs_dim, act_dim, hidden, critic_layers, n_critics)
    nets["q_target"] = EnsembleQ(obs_dim, act_dim, hidden, critic_layers, n_critics)
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
    with torch.no_grad():
        next_policy = squash(*nets["actor"](batch.next_obs), normal[:, 2 * n])
    target = own_targets(nets, batch, next_policy, None, alpha, args.gamma)  # D100, U102
    of_both = nets["actor"](torch.cat([batch.obs, batch.next_obs]))  # one pass, (2B, A) each
    with torch.no_grad():  # n of π(s), n of π(s')
        means, log_stds = (torch.stack(x.split(rows), 1).repeat_interleave(n, 1) for x in of_both)
        sampled, sampled_log_prob = squash(means, log_stds, normal[:, : 2 * n])
        log_uniform = torch.full((rows, n), -act_dim * math.log(2), device=sampled.device)
        log_probs = torch.cat([log_uniform, sampled_log_prob], 1)
    q = q_of_many(nets["qf"], batch.obs, torch.cat([batch.actions[:, None], uniform, sampled], 1))
    td_loss = (q[..., 0] - target).square().mean(1).sum()  # one MSE per critic: D2
    gap, _ = conservative_gap(q[..., 1:], q[..., 0], log_probs, None, -math.inf)
    cql_loss = args.cql_weight * gap.mean(1).sum()  # [CQL Eq. 4]
    mean, log_std = (x[:rows] for x in of_both)
    new_actions, log_pi = squash(mean, log_std, normal[:, 3 * n])
    missing = log_pi.detach() - act_dim  # of the target entropy, -A
    alpha_loss = -(log_alpha * missing).mean()  # [SAC, arXiv 1812.05905 §5]
    q_new = frozen_q(nets["qf"], batch.obs, new_actions).amin(0)  # of all critics: D101
    actor_loss = (alpha * log_pi - q_new).mean()  # [SAC §4.2]
    logs = {"loss/q": td_loss, "loss/actor": actor_loss, "loss/alpha": alpha_loss, "cql/gap": gap.mean()}
    logs |= {"q/mean": q[..., 0].mean(), "q/spread": q[..., 0].std(0, correction=0).mean()}
    logs |= {"policy/log_prob": log_pi.mean(), "alpha/entropy": log_alpha.exp()}
    logs["policy/data_log_prob"] = squashed_log_prob(mean, log_std, batch.actions).mean()
    return td_loss + cql_loss + alpha_loss + actor_loss, {k: v.detach() for k, v in logs.items()}


def actor_losses(
    nets: nn.ModuleDict, obs: torch.Tensor, noise: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Online: E[α log π - min over all K of Q_k], α fixed, and its logs.  [SO2]"""
    actions, log_pi = squash(*nets["actor"](obs), noise)
    loss = (alpha * log_pi - frozen_q(nets["qf"], obs, actions).amin(0)).mean()
    return loss, {"loss/actor": loss.detach(), "policy/log_prob": log_pi.mean().detach()}


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

    draw() gives indices, batch and logs; of_values and of_actor are value_losses and actor_losses, compiled or not.
    Nothing in here waits for the GPU.
    """
    for _ in range(args.utd):
        index, batch, logs = draw()
        rows, act_dim = batch.actions.shape
        perturbation = None
        if args.perturbation:
            perturbation = draw_perturbation(rows, act_dim, args, index.device)
        with torch.no_grad():
            next_policy = squash(*nets["actor"](batch.next_obs), torch.randn_like(batch.actions))
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
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    units = data.Units(moments=dataset.moments() if args.normalize_obs else None)
    replay = dataset.buffer(units, r.device, args.online_steps)  # own rows come after the dataset's
    interaction = data.Interaction(data.make_env(task, units), replay, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    sizes = args.hidden, args.critic_layers, args.n_critics
    nets = make_so2_nets(task.obs_dim, task.act_dim, *sizes).to(r.device)
    opt = make_so2_optimizer(nets, args.policy_lr, args.critic_lr, r.device)
    online_opt = make_so2_optimizer(nets, args.policy_lr_online, args.critic_lr_online, r.device)  # U102
    balance, balanced = None, {}
    if args.balanced_replay:
        balance = Balance(replay, task.obs_dim, task.act_dim, args, r.device)
        balanced = dict(ratio=balance.ratio, ratio_opt=balance.opt, priorities=balance.priorities)

    @torch.no_grad()
    def act(obs: torch.Tensor) -> torch.Tensor:  # deterministic
        return torch.tanh(nets["actor"](obs)[0])

    @torch.no_grad()
    def explore(obs: torch.Tensor) -> torch.Tensor:
        mean, log_std = nets["actor"](obs)
        return squash(mean, log_std, torch.randn_like(mean))[0]

    r.register(nets=nets, opt=opt, online_opt=online_opt, replay=replay, interaction=interaction, **balanced)
    compiled_losses, of_ratio = r.compiled(losses), r.compiled(ratio_losses)
    of_values, of_actor = r.compiled(value_losses), r.compiled(actor_losses)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        batch = replay.sample(args.batch_size)
        noise = draw_noise(args.batch_size, task.act_dim, args.cql_n_actions, r.device)
        loss, logs = compiled_losses(nets, batch, noise, args)
        learn(opt, loss)
        follow(nets, args.polyak)
        return logs

    if args.from_offline and r.once("from_offline"):
        r.import_phase("offline", args.from_offline, offline_settings, nets=nets)
    step_fn = r.capture(offline_step)
    for step in r.phase("offline", args.offline_steps):
        r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 and step + 1 < args.offline_steps:
            r.record(step + 1, evaluate(act, r.device))
    if r.once("offline_end"):
        r.record(args.offline_steps, evaluate(act, r.device))
        r.export_phase("offline", offline_settings, nets=nets)
        evaluate.export(act, r)

    # online: one environment step, then utd steps of the critics and one of the actor
    def draw() -> tuple[torch.Tensor, Batch, dict[str, torch.Tensor]]:
        return draw_plain(replay, args) if balance is None else balance.draw(of_ratio)

    def online_step() -> dict[str, torch.Tensor]:
        return update(nets, online_opt, draw, replay.fixed, of_values, of_actor, args)

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
        if balance is not None:
            balance.enter()
        if step >= args.warmup_steps:  # before, the pre-trained policy collects [SO2]
            r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act, r.device))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
