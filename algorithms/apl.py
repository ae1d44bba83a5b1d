"""APL on CQL with five critics: recent own rows alone are learned from without pessimism, all rows with it.

Paper    Zheng et al., "Adaptive Policy Learning for Offline-to-Online Reinforcement Learning", AAAI 2023, and its code,
         zhan0903/APL0, in the form GCQL, which CFDG stands on; critics: REDQ, Chen et al., ICLR 2021, arXiv 2101.05982.
         The other form, GCTD3BC (TD3 and a cloning term that is off on recent rows), is in no table here.
Idea     Pessimism is for what data do not say. A policy's own recent rows say what its actions are worth, so a batch of
         them needs none; one of all rows, most of them the dataset's, still does. A coin per gradient step chooses.
Symbols  Q qf, five of them | Q̂ q_target | π actor | α entropy weight exp(log_alpha) | α_cql cql_weight | p fifo_prob |
         R the regulariser | OORB the growing buffer (dataset and own rows) and the FIFO (the newest own rows)
Read     Args, ENV_PRESETS, networks, losses, toss (the coin), draw_oorb, update, train
         From calql.py: the actor, q_of_many, conservative_gap, frozen_q, draw_noise.
Notes    D1 all losses from the parameters before the step; one backward, one optimizer step. The code steps α first,
            then the critics one by one, and the actor's gradient goes through critics that were already stepped.
         D2 TD loss is a sum of MSEs, one per critic, not half of it: α_cql goes with that, as in calql.py.
         D5 log π of the data is that of the data's action; it is only logged. D6 the last layer's gain is 1e-2.
         D90 target critics start as copies; in the code they are other random networks, never copied.
         D91 the code alternates 1,000 environment steps, a new episode each time, and 10,000 updates. Here 10 updates
            follow every step from the 1,001st on: as many per step, and a row need not wait until its block is full.
         D92 networks and their start are calql.py's (orthogonal; log σ is a trained scale and offset of the output);
            the code's are uniform, last layers within 3e-3 and 1e-3; log σ is the output, from -5 on, not -20.
         D93 1M offline steps, as CFDG has it "to ensure consistency with the original paper"; the code as released
            makes 100,000: --offline-steps 100000.
         D94 evaluations as in every file, over 10 episodes; the code's are over 5.
         U1 embedded tasks: sizes for minutes on one core, 2 updates per step, and FIFO and its start as large a part of
            6,000 online steps as published (a fifth; a tenth, before updates begin); α_cql 2 on Reacher; unpublished.
         U3 optimizers and temperature go on unchanged at the switch [code].
         U90 AntMaze, Adroit, Maze2D: neither APL nor CFDG has APL there; the same settings, without much hope.
Metrics  loss/{q,actor,alpha}; cql/gap is logsumexp - Q on data, of batches that feel it;
         q/mean; q/spread, standard deviation over the five: large where data are few; apl/recent: 1 if the batch was
         of recent rows, half of the lines later on; alpha/entropy; policy/log_prob; policy/data_log_prob of the data.
Run      python algorithms/apl.py --env hopper-medium-v2 --seed 0
         always pessimistic: --fifo-prob 0 | as released: --offline-steps 100000 | one update per step: --utd 1
Cost     reacher-mini-v0: two CPU minutes. Published sizes: 3 gradient steps a second on one core online, of 2M in all.
         GPU not measured.
Fails    AntMaze: calql.py's deeper critics, reward scale and backup are what CQL needs there.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, run
from common.buffer import Batch, ReplayBuffer
from common.run import Count, Natural, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [CFDG §4.1]; a tenth in the code: D93
    online_steps: Natural = 100_000  # environment steps [code; CFDG §4.1]
    from_offline: Path | None = None  # run directory (or its offline.pt) to take the offline phase from
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it works
    compile: bool | None = None  # compile and capture the gradient step; default: on for cuda, off for cpu
    out_dir: Path = Path("runs")  # the run lives in <out-dir>/<file>/<env>/seed<seed>
    overwrite: bool = False  # start anew instead of resuming
    wandb: bool = False  # also log to Weights & Biases
    tensorboard: bool = False  # also log to the run directory, for TensorBoard
    eval_every: Count = 5_000  # steps of the running phase [code: offline; online every 1,000]
    eval_episodes: Count = 10  # episodes of an evaluation [PEX, CORL; code: 5]: D94
    # CQL with an ensemble
    batch_size: Several = 256  # transitions [code]
    gamma: Share = 0.99  # discount [code]
    polyak: Rate = 0.005  # share of qf copied into q_target at every gradient step [code]
    policy_lr: Positive = 1e-4  # Adam, actor and entropy weight [code]
    critic_lr: Positive = 3e-4  # Adam, critics and Lagrange multiplier; APL has none [code]
    hidden: Count = 256  # width of the hidden layers [code]
    critic_layers: Count = 3  # hidden layers of each critic [code]
    n_critics: Count = 5  # K, in the ensemble [code]
    critic_subset: Count = 2  # |Z|, critics drawn for a target [code]
    cql_weight: Weight = 5.0  # α_cql offline; online too, on batches of the growing buffer [code]
    cql_n_actions: Count = 10  # of each of three kinds: uniform, π(s), π(s') [code]
    normalize_obs: bool = False  # (obs - mean) / (std + 1e-3) of the dataset [CORL]
    # online
    warmup_steps: Natural = 1_000  # environment steps without updates, counted in online_steps [code]: D91
    utd: Count = 10  # gradient steps per environment step [code]: D91
    # APL
    fifo_prob: Share = 0.5  # p, chance that a batch is of the newest own rows alone [code]
    fifo_rows: Count = 20_000  # the newest own rows [code]
    fifo_from: Natural = 10_000  # own rows beyond which such batches are drawn [code]


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(eval_every=10_000, eval_episodes=100),  # [CORL]; APL has locomotion alone: U90
    "maze2d-": dict(eval_episodes=100),  # [CORL]
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, normalize_obs=True,
        utd=2, fifo_rows=1_200, fifo_from=600,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50, cql_weight=2.0),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "policy_lr", "critic_lr", "hidden", "critic_layers",
    "n_critics", "critic_subset", "cql_weight", "cql_n_actions", "normalize_obs",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "fifo_prob > 0": ("fifo_rows", "fifo_from")
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


# --- shared: apl.networks ---
def make_apl_nets(obs_dim: int, act_dim: int, args: Args) -> nn.ModuleDict:
    """actor, qf, q_target (a frozen copy of qf: D90), and log_alpha as the parameter of `weights`."""
    nets, sizes = nn.ModuleDict(), (args.hidden, args.critic_layers, args.n_critics)
    nets["actor"] = TanhGaussianActor(obs_dim, act_dim, args.hidden)
    nets["qf"] = EnsembleQ(obs_dim, act_dim, *sizes)
    nets["q_target"] = EnsembleQ(obs_dim, act_dim, *sizes)
    nets["weights"] = nn.ParameterDict({"log_alpha": torch.zeros(())})
    nets["q_target"].load_state_dict(nets["qf"].state_dict())
    nets["q_target"].requires_grad_(False)
    return nets


# --- end shared: apl.networks ---


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


# --- shared: apl.training ---
def draw_pair(n_critics: int, critic_subset: int, device: torch.device) -> torch.Tensor:
    """Different critics for a TD target, (critic_subset,); every choice is as likely as any other.  [REDQ Alg. 1]"""
    return torch.rand(n_critics, device=device).topk(critic_subset).indices


def losses(
    nets: nn.ModuleDict, batch: Batch, weight: float, draws: tuple, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of critics, actor and α, which share no parameter; from the old parameters: D1.

    weight = α_cql, 0 for recent rows: what it would weigh is not computed then. draws: the two of draw_noise, and the
    pair of draw_pair.
    """
    n, (uniform, normal, pair) = args.cql_n_actions, draws
    rows, act_dim = batch.actions.shape
    of_both = nets["actor"](torch.cat([batch.obs, batch.next_obs]))  # one pass, (2B, A) each
    of_each = [x[:, None].split(rows) for x in of_both]
    (mean, next_mean), (log_std, next_log_std) = of_each
    # the actor's own action (B, 1, A) and its log π (B, 1), with gradient
    new_actions, log_pi = squash(mean, log_std, normal[:, 3 * n :])
    with torch.no_grad():
        next_actions, _ = squash(next_mean, next_log_std, normal[:, 2 * n : 2 * n + 1])
        q_all = nets["q_target"](batch.next_obs, next_actions[:, 0])  # (K, B)
        q_next = q_all.index_select(0, pair).amin(0)  # no entropy term [code]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * q_next
    actions = batch.actions[:, None]
    if weight:
        with torch.no_grad():  # n of π(s), n of π(s')
            means, log_stds = ((x.expand(-1, n, -1), y.expand(-1, n, -1)) for x, y in of_each)
            sampled, sampled_log_prob = squash(
                torch.cat(means, 1), torch.cat(log_stds, 1), normal[:, : 2 * n]
            )
            log_uniform = torch.full((rows, n), -act_dim * math.log(2), device=target.device)
            log_probs = torch.cat([log_uniform, sampled_log_prob], 1)
        actions = torch.cat([actions, uniform, sampled], 1)
    q = q_of_many(nets["qf"], batch.obs, actions)  # (K, B, 1 + 3n), or (K, B, 1)
    td_loss = (q[..., 0] - target).square().mean(1).sum()  # one MSE per critic: D2
    cql_loss, logs = 0.0, {"loss/q": td_loss}
    if weight:
        gap, _ = conservative_gap(q[..., 1:], q[..., 0], log_probs, None, -math.inf)
        cql_loss, logs["cql/gap"] = weight * gap.mean(1).sum(), gap.mean()  # R [CFDG Eqs. 2, 3]
    log_alpha = nets["weights"]["log_alpha"]
    missing = log_pi.detach() - act_dim  # of the target entropy, -A
    alpha_loss = -(log_alpha * missing).mean()  # [SAC, arXiv 1812.05905 §5]
    q_new = frozen_q(nets["qf"], batch.obs, new_actions[:, 0]).mean(0)  # of all critics [REDQ Alg. 1; code]
    actor_loss = (log_alpha.detach().exp() * log_pi[:, 0] - q_new).mean()  # [SAC §4.2]
    logs |= {"loss/actor": actor_loss, "loss/alpha": alpha_loss}
    logs |= {"q/mean": q[..., 0].mean(), "q/spread": q[..., 0].std(0, correction=0).mean()}
    logs |= {"policy/log_prob": log_pi.mean(), "alpha/entropy": log_alpha.exp()}
    logs["policy/data_log_prob"] = squashed_log_prob(mean[:, 0], log_std[:, 0], batch.actions).mean()
    return td_loss + cql_loss + alpha_loss + actor_loss, {k: v.detach() for k, v in logs.items()}


def toss(args: Args, online: ReplayBuffer, update: int) -> bool:
    """Whether the online update of this number is on recent rows.  [OORB]

    A coin per update that does not depend on what was drawn before, so that a stopped run goes on with the same ones.
    It falls on the host, where the number of rows is known, too: recent batches are a step of their own, without what
    they do not feel.
    """
    coin = np.random.default_rng((args.seed, update)).random()
    return coin < args.fifo_prob and online.rows > args.fifo_from


def draw_oorb(offline: ReplayBuffer, online: ReplayBuffer, n: int, recent: bool, args: Args) -> Batch:
    """n rows of the FIFO, the newest own rows, or of the growing buffer, which has all there are.  [OORB]"""
    if recent:
        back = online.draw(n, online.size.clamp(max=args.fifo_rows))
        return online.take(online.size - 1 - back)
    index = offline.draw(n, offline.size + online.size)  # own rows come after the dataset's
    own = index >= offline.size
    # one of the two is meant; the other's index need only exist
    pairs = offline.take(index.minimum(offline.size - 1)), online.take((index - offline.size).clamp(min=0))
    choose = (torch.where(own if a.ndim == 1 else own[:, None], b, a) for a, b in zip(*pairs, strict=True))
    return Batch(*choose)


def update(nets: nn.ModuleDict, opt: torch.optim.Optimizer, loss: torch.Tensor, polyak: float) -> None:
    """One gradient step and the target update; nothing in here waits for the GPU."""
    opt.zero_grad(set_to_none=True)
    loss.backward()  # disjoint parameters: the same as one backward per loss
    opt.step()
    with torch.no_grad():
        torch._foreach_lerp_([*nets["q_target"].parameters()], [*nets["qf"].parameters()], polyak)


def make_apl_optimizer(
    nets: nn.ModuleDict, policy_lr: float, critic_lr: float, device: torch.device
) -> torch.optim.Adam:
    """Adam over actor and α at one rate, critics at the other."""
    policy = {"params": [*nets["actor"].parameters(), nets["weights"]["log_alpha"]], "lr": policy_lr}
    critic = {"params": [*nets["qf"].parameters()], "lr": critic_lr}
    return torch.optim.Adam([policy, critic], fused=True, capturable=device.type == "cuda")


# --- end shared: apl.training ---


def train(args: Args) -> dict[str, float]:
    task = data.get_task(args.env)
    r = run.Run(args, __file__, data.filed_name(args.env, args.dataset), ENV_PRESETS, NEEDS)
    if r.final:
        return r.final
    if args.critic_subset > args.n_critics:
        raise run.UsageError("--critic-subset", args.critic_subset, f"at most --n-critics {args.n_critics}")
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    units = data.Units(moments=dataset.moments() if args.normalize_obs else None)
    offline = dataset.buffer(units, r.device)
    online = offline.like(args.online_steps)
    interaction = data.Interaction(data.make_env(task, units), online, args.seed, units)
    evaluate = data.Evaluator(task, args.eval_episodes, args.seed, units)

    # networks
    nets = make_apl_nets(task.obs_dim, task.act_dim, args).to(r.device)
    opt = make_apl_optimizer(nets, args.policy_lr, args.critic_lr, r.device)

    @torch.no_grad()
    def act(obs: torch.Tensor) -> torch.Tensor:  # deterministic
        return torch.tanh(nets["actor"](obs)[0])

    @torch.no_grad()
    def explore(obs: torch.Tensor) -> torch.Tensor:
        mean, log_std = nets["actor"](obs)
        return squash(mean, log_std, torch.randn_like(mean))[0]

    r.register(nets=nets, opt=opt, online=online, interaction=interaction)
    compiled_losses = r.compiled(losses)
    offline_settings = r.settings(OFFLINE_SETTINGS)

    def learn(batch: Batch, weight: float) -> dict[str, torch.Tensor]:
        noise = draw_noise(args.batch_size, task.act_dim, args.cql_n_actions, r.device)
        draws = *noise, draw_pair(args.n_critics, args.critic_subset, r.device)
        loss, logs = compiled_losses(nets, batch, weight, draws, args)
        update(nets, opt, loss, args.polyak)
        return logs

    # offline: gradient steps on the dataset
    def offline_step() -> dict[str, torch.Tensor]:
        return learn(offline.sample(args.batch_size), args.cql_weight)

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

    # online: one environment step, then utd gradient steps, each on recent own rows or on all there are
    def online_step(recent: bool) -> dict[str, torch.Tensor]:
        batch = draw_oorb(offline, online, args.batch_size, recent, args)
        return learn(batch, 0.0 if recent else args.cql_weight)  # no pessimism on recent rows [CFDG Eq. 3]

    step_fns = {recent: r.capture(partial(online_step, recent)) for recent in (True, False)}
    for step in r.phase("online", args.online_steps):
        if episode := interaction.step(explore):
            r.record(step + 1, episode)
        if step >= args.warmup_steps:
            for k in range(args.utd):
                recent = toss(args, online, step * args.utd + k)
                logs = step_fns[recent]()
            r.log(step, logs | {"apl/recent": float(recent)})
        if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
            r.record(step + 1, evaluate(act, r.device))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
