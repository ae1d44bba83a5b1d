"""PEX on IQL: the offline policy stays as it is; a second one learns online; Q chooses between their actions.

Paper    Zhang, Xu, Yu, "Policy Expansion for Bridging Offline-to-Online Reinforcement Learning", ICLR 2023,
         arXiv 2302.00935, and its code, Haichao-Zhang/PEX. Backbone: iql.py, line for line outside the NEW parts.
Idea     Fine-tuning a policy first destroys what it can do. Here it is kept, and a new one that begins at random need
         not be better than it anywhere: where its action has the lower Q it is not taken.
Symbols  π_β offline_actor, frozen | π_θ actor, online the new one | a_β mode of π_β | a_θ sample of π_θ |
         κ choice_inv_temp | Q min of qf | Q̂ min of q_target | V vf | A = Q̂ - V | τ expectile | β inv_temp
Read     Args; NEW: choice_probs, compose, expand, pex_losses; train.
         From iql.py: make_nets (actor, qf, q_target, vf), losses (offline), update (gradient step and target).
Notes    D1, D2, U1 as in iql.py. D1 here: the code composes after the steps of V, Q and the target, we before.
         D3 the offline schedule is iql.py's; online a fresh optimizer, constant, as in PEX's code.
         D4 the code executes and stores a_θ unclipped; we clip, choose, execute, store.
         D5 q_target goes on as saved, as in PEX's code (its IQL, to which iql.py's D5 refers, copies).
         D70 the code scores and imitates unclipped a_θ in the loss of π_θ; ours are clipped: Q knows the box only.
         D71 evaluation: the code samples a_θ, and on its own the choice, with chance 0.1; we take the mode of π_θ and
            the larger Q: a deterministic policy as in every file (--eval-random 0.1 is the code's).
         D72 the code's README has τ = 0.9, β = 10 on halfcheetah-random too, and its flags default to β = 10; here
            0.7 and 3 on all locomotion [DARE Table 5], so that the offline phase is iql.py's.
         D73 budget: PEX and CFDG have 1M online steps, DARE 200,000, as here (--online-steps 1000000).
         U70 κ: 10 is the code's default on all tasks; papers with PEX as a base state none. It multiplies Q as it is:
            nearly the larger Q on locomotion (Q of hundreds), soft on AntMaze. --normalize-reward, which the embedded
            tasks have, changes its meaning: 0.1 on Reacher (final score, seeds 100 to 102: 65.1; 0.15: 64.1; 10: 57.8).
         U71 Adroit, Maze2D: PEX has neither; iql.py's settings, dropout in the loss of π_θ included.
Metrics  those of iql.py, online with loss/actor of π_θ; pex/online_share, actions of the batch that are π_θ's: climbs
         if π_θ is of use; pex/adv, mean A of the composed actions: below 0 while V is of better ones.
Run      python algorithms/pex.py --env hopper-medium-v2 --seed 0
         the common start: --from-offline runs/iql/hopper-medium-v2/seed0
         CFDG's budget: --online-steps 1000000 | the choice by chance: --choice-inv-temp 0
Cost     reacher-mini-v0 from an offline phase: half a CPU minute. Three more passes of critics and actors than iql.py.
Fails    where Q ranks noise above π_β (few rows, narrow data), a_θ of standard deviation 1 is taken and scores fall in
         the first steps, the more the harder the choice: κ = 10 ends 9 points below IQL on Reacher, 0.1 ends 2 below;
         AntMaze with τ = 0.7 (default of the code) learns nothing: its README has 0.9.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, run
from common.buffer import Batch, mix
from common.run import Count, Fraction, Natural, Number, Portion, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [DARE §7.1]
    online_steps: Natural = 200_000  # environment steps [DARE §7.1]; a fifth of PEX's own: D73
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
    expectile: Fraction = 0.7  # τ [DARE Table 5]; halfcheetah-random as all locomotion, here and in β: D72
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
    append_online: bool = False  # one buffer, batches from all of it [CORL]
    # PEX
    choice_inv_temp: Weight = 10.0  # κ, of Q in training units; 0: by chance [code: all tasks]: U70
    eval_random: Portion = 0.0  # chance that evaluation draws the action, or the choice [code: 0.1]: D71


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(  # [IQL App. B; episodes: CORL]
        expectile=0.9, inv_temp=10.0, reward_bias=-1.0, eval_every=10_000, eval_episodes=100,
    ),
    **{k: dict(expectile=0.8, dropout=0.1, normalize_obs=True)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [CORL]; PEX has neither these nor Maze2D: U71
    "maze2d-": dict(normalize_obs=True, eval_episodes=100),  # [CORL, offline IQL]
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, lr=5e-4, polyak=0.01,
        normalize_obs=True, normalize_reward=True,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=15_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50, choice_inv_temp=0.1),  # U70
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "expectile", "inv_temp", "lr", "hidden",
    "normalize_reward", "normalize_obs", "reward_bias", "dropout",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "not append_online": ("offline_frac",)
}


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


# NEW: the method. Outside the NEW sections this file is algorithms/iql.py.
# --- shared: pex.composition ---
def choice_probs(q: torch.Tensor, choice_inv_temp: float) -> torch.Tensor:
    """P_w[i] = exp(κ Q(s, a_i)) / Σ_j exp(κ Q(s, a_j)), q (K, B) of K policies -> (K, B).  [PEX, composition]"""
    return torch.softmax(choice_inv_temp * q, 0)


Draws = tuple[torch.Tensor, torch.Tensor]  # noise (B, A) of N(0, 1), dice (B,) of U[0, 1)


def compose(
    nets: nn.ModuleDict, offline_actor: nn.Module, obs: torch.Tensor, draws: Draws, choice_inv_temp: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Action of the expanded policy, and whether it is π_θ's: obs (B, O) -> (B, A), (B,).

    Noise 0 is the mode of π_θ; a die of 0.5 takes the larger Q, π_β's of two equal ones.
    """
    noise, dice = draws
    mean, log_std = nets["actor"](obs)
    a_off, _ = offline_actor(obs)  # always the mode [code]
    a_on = (mean + log_std.exp() * noise).clamp(-1, 1)  # D4, D70
    q = torch.stack([nets["qf"](obs, a).amin(0) for a in (a_off, a_on)])  # online critics, not targets [code]
    chosen = dice < choice_probs(q, choice_inv_temp)[1]
    return torch.where(chosen[:, None], a_on, a_off), chosen


@torch.no_grad()
def expand(actor: nn.Module, offline_actor: nn.Module) -> None:
    """Exchange parameters, in place: what was learned is kept in `offline_actor`, its random ones begin online."""
    for learned, fresh in zip(actor.parameters(), offline_actor.parameters(), strict=True):
        kept = learned.clone()
        learned.copy_(fresh)
        fresh.copy_(kept)


def pex_losses(
    nets: nn.ModuleDict, offline_actor: nn.Module, batch: Batch, draws: Draws, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As `losses`, but π_θ learns from actions of the expanded policy, none from the batch; old parameters: D1."""
    with torch.no_grad():
        q_hat = nets["q_target"](batch.obs, batch.actions).amin(0)
        v_next = nets["vf"](batch.next_obs)
        actions, chosen = compose(nets, offline_actor, batch.obs, draws, args.choice_inv_temp)
        q_composed = nets["q_target"](batch.obs, actions).amin(0)
    v = nets["vf"](batch.obs)
    adv, adv_composed = q_hat - v, q_composed - v
    v_loss = value_loss(adv, args.expectile)  # [IQL Eq. 5]
    target = td_target(batch.rewards, batch.terminations, v_next, args.gamma)
    q = nets["qf"](batch.obs, batch.actions)
    q_loss = (q - target).square().mean()  # [IQL Eq. 6]
    mean, log_std = nets["actor"](batch.obs)
    weight = awr_weight(adv_composed, args.inv_temp)
    actor_loss = -(weight * log_prob(mean, log_std, actions)).mean()  # [IQL Eq. 7 at composed actions; code]
    logs = {"loss/v": v_loss, "loss/q": q_loss, "loss/actor": actor_loss}
    logs |= {"q/mean": q.mean(), "adv/mean": adv.mean(), "log_std/mean": log_std.mean()}
    logs |= {"pex/online_share": chosen.to(q).mean(), "pex/adv": adv_composed.mean()}
    return v_loss + q_loss + actor_loss, {k: x.detach() for k, x in logs.items()}


# --- end shared: pex.composition ---


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
    offline = dataset.buffer(units, r.device, args.online_steps if args.append_online else 0)
    online = offline if args.append_online else offline.like(args.online_steps)
    interaction = data.Interaction(data.make_env(task, units), online, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    nets = make_nets(task.obs_dim, task.act_dim, args.hidden, args.dropout).to(r.device)
    offline_actor = GaussianActor(task.obs_dim, task.act_dim, args.hidden, args.dropout).to(r.device)  # NEW
    offline_actor.requires_grad_(False)  # NEW: π_β after the offline phase; until then what π_θ will begin as
    opt = make_optimizer(nets, args.lr, r.device)
    updates = torch.zeros((), device=r.device)  # of the offline phase

    @torch.no_grad()
    def act(obs: torch.Tensor) -> torch.Tensor:  # deterministic
        return nets["actor"](obs)[0]

    @torch.no_grad()
    def explore(obs: torch.Tensor) -> torch.Tensor:  # NEW
        noise = torch.randn(len(obs), task.act_dim, device=r.device)
        draws = noise, torch.rand(len(obs), device=r.device)
        return compose(nets, offline_actor, obs, draws, args.choice_inv_temp)[0]

    @torch.no_grad()
    def act_online(obs: torch.Tensor) -> torch.Tensor:  # NEW: deterministic, but for --eval-random: D71
        noise = torch.randn(obs.shape[0], task.act_dim, device=r.device)
        lots = torch.rand(3, obs.shape[0], device=r.device)
        noise = torch.where(lots[0][:, None] < args.eval_random, noise, 0.0)
        dice = torch.where(lots[1] < args.eval_random, lots[2], 0.5)
        return compose(nets, offline_actor, obs, (noise, dice), args.choice_inv_temp)[0]

    own = {"offline_actor": offline_actor}  # NEW
    r.register(nets=nets, opt=opt, updates=updates, online=online, interaction=interaction, **own)
    compiled_losses = r.compiled(losses)
    compiled_pex_losses = r.compiled(pex_losses)  # NEW
    offline_settings = r.settings(OFFLINE_SETTINGS)

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        decay_actor_lr(opt, updates, args.lr, args.offline_steps)
        loss, logs = compiled_losses(nets, offline.sample(args.batch_size), args)
        update(nets, opt, loss, args.polyak)
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
        expand(nets["actor"], offline_actor)  # NEW
        restart_optimizer(opt, args.lr)  # D3; q_target stays: D5

    # online: one environment step, then utd gradient steps on half dataset, half own experience
    def online_step() -> dict[str, torch.Tensor]:
        if args.append_online:
            batch = offline.sample(args.batch_size)
        else:
            index = offline.draw(n_offline), online.draw(args.batch_size - n_offline)
            batch = mix(offline.take(index[0]), online.take(index[1]))
        draws = torch.randn_like(batch.actions), torch.rand_like(batch.rewards)  # NEW
        loss, logs = compiled_pex_losses(nets, offline_actor, batch, draws, args)  # NEW
        update(nets, opt, loss, args.polyak)
        return logs

    step_fn = r.capture(online_step)
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
        if step >= args.warmup_steps:
            for _ in range(args.utd):
                logs = step_fn()
            r.log(step, logs)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act_online, r.device))  # NEW
    evaluate.export(act_online, r)  # NEW
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
