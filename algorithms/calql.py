"""Cal-QL and CQL, offline and online: push Q down on sampled actions, but not below the data's returns.

Paper    Nakamoto et al., "Cal-QL: Calibrated Offline RL Pre-Training for Efficient Online Fine-Tuning",
         NeurIPS 2023, arXiv 2303.05479v2; CQL: Kumar et al., NeurIPS 2020, arXiv 2006.04779. Locomotion
         settings: DARE Table 4 = StratDiff Table 2, filled in from CORL where they are silent (there is no
         official locomotion recipe).
Symbols  Q̂ q_target | Q qf | π actor | α entropy weight exp(log_alpha) | α_cql cql_weight | α' Lagrange
         multiplier | G mc_returns | R the regulariser
Read     Args, ENV_PRESETS, networks, losses, Monte-Carlo returns, update, train
Notes    D1 all losses from the parameters before the step, as CORL; one backward, one optimizer step.
         D2 TD loss is a sum of two MSEs, not half of one: the tabulated α_cql go with CORL's code.
         D3 calibration is off online, as in the CORL-derived papers; --calibrate-online is the official
            mode, with real returns at the end of each episode and batches from finished episodes only.
         D4 no update in the first warmup_steps online [AD2S, PEX, WSRL]; CORL's first batches are copies of
            one row.
         D5 log π of the data is that of the data's action (CORL's function scores a fresh sample); it is
            only logged.
         D6 the last layer's gain is 1e-2 [official code], CORL's sqrt 2.
         D7 episodes end where the file says, and online rewards get the same scale and bias.
         U1 hopper-mini-v0: sizes that finish in minutes on two CPU cores; not a published setting.
         U2 returns of episodes that a time limit cut start from 0 [CORL].
         U3 optimizers and temperature go on unchanged at the switch [CORL].
Metrics  loss/{q,actor,alpha}; cql/gap is logsumexp - Q on data, falls below 0 when Q is conservative;
         cql/bound_share of policy-action entries below G: 0 means Cal-QL is CQL here; alpha/entropy;
         alpha/lagrange; q/mean; policy/log_prob of own samples; policy/data_log_prob of the data's actions.
Run      python algorithms/calql.py --env hopper-medium-v2 --seed 0
         CQL: --no-calibrate
Cost     hopper-mini-v0: 1.5 minutes on one CPU core; GPU not measured.
Fails    Maze2D with CORL's settings (CQL scores -9 there): rewards of 0.05 a step are little beside a conservative term
         of weight 1 and more, Q falls below 0; --no-lagrange --cql-weight 0.1 --cql-weight-online 0.1 learns: README.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, run
from common.buffer import Batch, ReplayBuffer, mix
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


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(  # [DARE Table 4; episodes: CORL]
        critic_layers=5, cql_weight=5.0, cql_weight_online=5.0, lagrange=True, max_target_backup=True,
        normalize_obs=False, reward_scale=10.0, reward_bias=-5.0, sparse_reward=True, target_gap=0.8,
        eval_every=10_000, eval_episodes=100,
    ),
    **{k: dict(cql_weight=1.0, cql_weight_online=1.0, max_target_backup=True, normalize_obs=False)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [CORL, fine-tuning]
    "maze2d-": dict(policy_lr=3e-5, lagrange=True, target_gap=5.0, eval_episodes=100),  # [CORL, offline CQL]
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, cql_weight=5.0, cql_weight_online=5.0,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50, cql_weight_online=1.0),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "policy_lr", "critic_lr", "hidden", "critic_layers",
    "cql_weight", "cql_n_actions", "cql_clip_min", "calibrate", "lagrange", "target_gap", "max_target_backup",
    "normalize_obs", "reward_scale", "reward_bias", "sparse_reward",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "lagrange": ("target_gap",),
    "calibrate": ("sparse_reward",),
}


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

    r.register(nets=nets, opt=opt, online=online, interaction=interaction, **returns.state())
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
    step_fn = r.capture(offline_step)
    for step in r.phase("offline", args.offline_steps):
        r.log(step, step_fn())
        if (step + 1) % args.eval_every == 0 and step + 1 < args.offline_steps:
            r.record(step + 1, evaluate(act, r.device))
    if r.once("offline_end"):
        r.record(args.offline_steps, evaluate(act, r.device))
        r.export_phase("offline", offline_settings, nets=nets, opt=opt)  # U3
        evaluate.export(act, r)

    # online: one environment step, then utd gradient steps on half dataset, half own experience
    def online_step() -> dict[str, torch.Tensor]:
        n_online = args.batch_size - n_offline
        index = offline.draw(n_offline), online.draw(n_online, returns.drawable)
        batch = mix(offline.take(index[0]), online.take(index[1]))
        noise = draw_noise(args.batch_size, task.act_dim, args.cql_n_actions, r.device)
        bound = None  # D3
        if args.calibrate_online:
            bound = torch.cat([returns.dataset[index[0]], returns.own[index[1]]])
        loss, logs = compiled_losses(nets, batch, bound, args.cql_weight_online, noise, args)
        update(nets, opt, loss, args.polyak)
        return logs

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
            returns.add_episode(episode["train/episode_length"])
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
