"""CFDG on IQL: one diffusion model of dataset and own rows, told apart by a guided label; a third of a batch from it.

Paper    Huang, Liu, Zhang, Yu, Li, "Offline-to-Online Reinforcement Learning with Classifier-Free Diffusion Generation"
         (CFDG), ICML 2025, no code; the EDM: Karras et al., NeurIPS 2022, arXiv 2206.00364; network, training: SynthER,
         arXiv 2303.06614, code conglu1997/SynthER. Backbone: iql.py, line for line outside the NEW parts.
Idea     Own rows are few and near the policy, the dataset's are many and diverse. A model that knows which is which
         makes more of both; a batch then has a third of each: own, dataset, generated, the last mostly of own kind.
Symbols  F LabelledNet | D denoiser | c label | ∅ NULL | w guidance_w | p_uncond label_dropout | r synthetic_frac |
         D_on_syn, D_off_syn rows of the label ONLINE, OFFLINE | N sample_steps | S_churn sample_churn
Read     Args; NEW: batch_counts, LabelledNet; TransitionNet, Generator; LabelledGenerator; train.
         From iql.py: make_nets (actor, qf, q_target, vf), losses (their sum, of a batch), update (gradient step and
         target), decay_actor_lr. r.phase(name, n): the steps up to n not done yet; r.once(name): true once.
Notes    D1, D2, D3, D4, D5, U1 as in iql.py. Of generated rows, in every file that has them:
         D20 papers: raw rewards (SynthER on DMC, EDIS); here: all but the flag normalised; the EDM is for variance 1.
         D21 papers: the flag of the end is a feature, cut at 0.5 (--terminal-flag joint: on 1-10 % of the falls), or 0
            [EDIS]; here: drawn with the probability that a tree of real rows gives s'.
         D22 papers: rows as they come; here: actions clipped to the box, rewards to the range learned from, rows not
            finite dropped (an error above 1 %).
         D24 rows without a known s' (terminal ones of files without next_observations) are not learned from.
         U31 each training is from scratch and replaces all rows [SynthER, EDIS]. U35 on a GPU the model is in bfloat16.
         Of CFDG:
         D40 budget: 1M + 1M steps [§4.1]; other files have 200,000 online, for a table with them --online-steps 200000.
         D41 paper: "100K epochs" [Table 5]; here: gradient steps, SynthER's count, as the hours of Table 6 allow.
         D42 paper: Algorithm 1 adds to the synthetic buffers (1M); here: new rows replace those of an older policy.
         D43 w is Eq. 7's; Eq. 6 counts w + 1. PGR and GTA guide one of a Heun step's halves: their scale 2 is w = 0.5
            here, where both are. The defaults of the library that the paper names (6, rescaled) are not Eq. 7.
         U40 w and p_uncond have no value: 0.5, 0.25 [PGR; AD2S]. Guidance widens the labels' distance, costs fidelity.
         U41 the label's way in: a learned row, null too, added to the time embedding.
         U42 half of the model's batch is own rows, moments weigh alike; by rows, 10,000 own ones would vanish in 1M.
         U43 rows per regeneration: 125,000, split as a batch is: 100,000 [EDIS] and 25,000.
         U44 a batch keeps its size: 256 = 86 own + 85 dataset + 68 + 17; "concatenate" [§3.3] may also mean 3 · 128.
         U45 regenerations at 1/10, 2/10 ... of the online phase: both intervals of Table 5; until then half dataset,
            half own. The loss does not tell generated rows from real ones.
         U46 Table 3's "w/o guidance": --guidance-w 0 has labels, --no-labels has not. SynthER on the union, by rows:
            iql_synther.py --synther-data both --synthetic-frac 0.333.
Metrics  those of iql.py; loss/diffusion (< 1); syn/* of each regeneration: common/judge.py, where syn/js_* is Table 2's
         and, if generation helps, below syn/dataset_js_*, its "Offline"; synthetic-<k>.npz: 2,000 rows of each kind.
Run      python algorithms/iql_cfdg.py --env hopper-medium-v2 --seed 0
         Table 3: no guidance --guidance-w 0 | nor labels --no-labels | no offline augmentation --online-label-frac 1
         --guidance-w 2 | --label-dropout 0.1 | 1 : 1 labels --online-label-frac 0.5 | --synthetic-frac 0.5
         every 10,000 steps --regenerations 100 | four times cheaper sampling --sample-steps 32 --sample-churn 0
         the common start: --from-offline runs/iql/hopper-medium-v2/seed0
Cost     reacher-mini-v0 from an offline phase: 1.3 CPU minutes; published sizes want a GPU (not measured there).
Fails    on reacher-mini-v0 labels with guidance cost 3.7 points [0.3, 7.1] of the final score (README: ablations); of
         guidance alone that is not seen. With it rows spread less (syn/std_ratio 0.98-1.01; w = 0: 1.02-1.04, three or
         four seeds each), as U40 would have it; that this costs the points was not tried.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, edm, judge, run
from common.buffer import Batch, ReplayBuffer, mix, union_rows
from common.run import Count, Fraction, Natural, Number, Portion, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [§4.1]
    online_steps: Natural = 1_000_000  # environment steps [§4.1]: D40
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
    # NEW: labels
    labels: bool = True  # the model knows dataset from own rows; without, one unlabelled model: U46
    guidance_w: Weight = 0.5  # w of Eq. 7; 0 = no guidance: U40, D43
    label_dropout: Portion = 0.25  # p_uncond, share of training rows with the null label: U40
    online_label_frac: Rate = 0.8  # share of generated rows with the online label; 1 = no others [§4.1]
    # NEW: synthetic rows
    terminal_flag: Literal["classifier", "joint"] = "classifier"  # from s', or as a feature of the rows: D21
    synthetic_frac: Fraction = 1 / 3  # share of a batch that is generated [§4.1]: U44
    regenerations: Count = 10  # parts of the online phase, a new model after all but the last [Table 5]: U45
    synthetic_rows: Count = 125_000  # rows per regeneration [EDIS]: U43, D42
    # NEW: diffusion model
    diffusion_steps: Count = 100_000  # gradient steps per regeneration [Table 5]: D41
    diffusion_batch: Count = 256  # rows [Table 5]
    diffusion_lr: Positive = 3e-4  # Adam, cosine to 0 within a regeneration [Table 5]
    diffusion_width: Count = 1_024  # of the residual blocks [Table 5]
    diffusion_depth: Natural = 6  # residual blocks [Table 5]
    diffusion_time_dim: Count = 256  # of the time embedding [SynthER, online]
    sample_steps: Several = 128  # noise levels, N [Table 5]
    sample_churn: Weight = 80.0  # S_churn; 0 = deterministic, which 32 levels need [App. A.2]
    sample_batch: Count = 10_000  # rows generated at once [EDIS]


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(  # [IQL App. B; episodes: CORL]
        expectile=0.9, inv_temp=10.0, reward_bias=-1.0, eval_every=10_000, eval_episodes=100,
    ),
    **{k: dict(expectile=0.8, dropout=0.1, normalize_obs=True)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [CORL]
    "maze2d-": dict(normalize_obs=True, eval_episodes=100),  # [CORL, offline IQL]
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, lr=5e-4, polyak=0.01,
        normalize_obs=True, normalize_reward=True,
        regenerations=3, synthetic_rows=10_000, diffusion_steps=4_000, diffusion_width=256, diffusion_depth=3,
        diffusion_time_dim=64, diffusion_lr=1e-3, sample_steps=32, sample_churn=0.0, sample_batch=5_000,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=15_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "expectile", "inv_temp", "lr", "hidden",
    "normalize_reward", "normalize_obs", "reward_bias", "dropout",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "labels": ("guidance_w", "label_dropout", "online_label_frac")
}


# NEW: CFDG's own, from here to iql.py's blocks: shares of a batch, labels; then the generator.
# --- shared: iql_cfdg.labels ---
def online_label_share(args: Args) -> float:
    """Of generated rows; all of them if there are no labels."""
    return args.online_label_frac if args.labels else 1.0


def label_counts(args: Args) -> tuple[int, int]:
    """Generated rows of a batch: online label, offline label.  [§4.1]"""
    n_synthetic = round(args.synthetic_frac * args.batch_size)
    n_first = round(online_label_share(args) * n_synthetic)
    return n_first, n_synthetic - n_first


OFFLINE, ONLINE, NULL = 0, 1, 2  # labels; ∅ stands for either


class LabelledNet(nn.Module):
    """F(x, ln σ / 4, c): TransitionNet whose condition is a learned row of the label, labels (B,): U41."""

    def __init__(self, features: int, width: int, depth: int, time_dim: int):
        super().__init__()
        self.net = TransitionNet(features, width, depth, time_dim)
        self.rows = nn.Embedding(3, time_dim)

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.net(x, c_noise, self.rows(labels))


# --- end shared: iql_cfdg.labels ---


# --- shared: iql_cfdg.counts ---
def batch_counts(args: Args) -> tuple[int, int, int, int]:
    """Rows of a batch once there are generated ones: own, dataset, online label, offline label.  [§4.1], U44"""
    n_labels = label_counts(args)
    n_real = args.batch_size - sum(n_labels)
    n_offline = math.ceil(args.offline_frac * n_real - 0.5)  # own experience has the odd row
    return n_real - n_offline, n_offline, *n_labels


# --- end shared: iql_cfdg.counts ---


# NEW: the diffusion model and what it generates, as in synther.py
# --- shared: synther.generator ---
class TransitionNet(nn.Module):
    """F of the EDM, a residual MLP: x (B, D), ln σ / 4 (B,), condition (B, T) added to the time embedding -> (B, D).

    The denoiser is D(x; σ) = x / (1 + σ²) + σ / √(1 + σ²) · F(x / √(1 + σ²), ln σ / 4): edm.denoise. Pre-activation
    blocks of one layer each, no norm; time by 8 fixed random frequencies.  [SynthER]
    """

    def __init__(self, features: int, width: int, depth: int, time_dim: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(8))
        self.inlet, self.expand = nn.Linear(features, time_dim), nn.Linear(time_dim, width)
        self.time = nn.Sequential(nn.Linear(17, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, features)

    def reset_parameters(self) -> None:
        self.frequencies.normal_()

    def forward(
        self, x: torch.Tensor, c_noise: torch.Tensor, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        angles = 2 * math.pi * c_noise[:, None] * self.frequencies
        e = self.inlet(x) + self.time(torch.cat([c_noise[:, None], angles.sin(), angles.cos()], -1))
        h = self.expand(e if condition is None else e + condition)
        for layer in self.blocks:
            h = h + layer(F.relu(h))
        return self.out(F.relu(h))


class Generator:
    """An EDM of transitions [s, a, r, s'], in units of their moments, and the buffer of what it generates.

    Its sampler follows the slope (x - D(x; σ)) / σ from noise at σ = 80 down to a row at σ = 0. `real` are the buffers
    of dataset and own rows. A method with conditions has a `draw` and a `begin` of its own.
    """

    TREE_DEPTH = 12  # at most; the robots' rules need 2 or 3 cuts, a goal's disc more

    def __init__(self, r: run.Run, args: Args, net: nn.Module, real: list[ReplayBuffer]):
        self.r, self.args, self.net, self.real = r, args, net.to(r.device), real
        self.sources = real  # of the last training
        self.obs_dim, self.act_dim = real[0].widths[:2]
        self.features = Generator.features(args, real[0])
        self.synthetic = real[0].like(args.synthetic_rows)
        flag = int(args.terminal_flag == "joint")
        self.moments = edm.Moments(self.features, flag, r.device)  # of all features but the flag: D20
        self.ema = edm.EMA(self.net)
        params, lr = [*self.net.parameters()], torch.tensor(args.diffusion_lr, device=r.device)
        adam = dict(betas=(0.9, 0.99), fused=True, capturable=r.device.type == "cuda")
        self.opt = torch.optim.Adam(params, lr=lr, **adam)  # [SynthER]
        self.count = torch.zeros((), device=r.device)  # gradient steps since the restart
        self.bounds = torch.zeros(2, device=r.device)  # of rewards learned from
        self.totals = torch.zeros(4, device=r.device)  # rows, clipped actions, clipped rewards, rows dropped
        self.loss, self.denoise = r.compiled(edm.loss), r.compiled(edm.denoise)  # with --compile
        self.tree: tuple | float = 0.0  # p(terminal | s')

    @staticmethod
    def features(args: Args, buffer: ReplayBuffer) -> int:
        """Length D of a modelled row: s, a, r, s', and the flag of termination if it is a feature: D21."""
        return buffer.table.shape[1] - int(args.terminal_flag == "classifier")

    def state(self) -> dict:
        """What a checkpoint holds, by name."""
        names = ("net", "ema", "opt", "count", "moments", "bounds", "totals", "synthetic")
        return {f"generator_{k}": getattr(self, k) for k in names}

    def regenerate(self, k: int, sources: list[ReplayBuffer], weights: list[float] | None = None) -> None:
        """The k-th time, from 0: the model learns `sources` from scratch, then new rows replace the old.

        Steps of a phase count on from one time to the next, so that a resumed run finds its place.
        """
        self.learn(k, sources, weights)
        self.refill(k)

    # -- training --

    def learn(self, k: int, sources: list[ReplayBuffer], weights: list[float] | None = None) -> None:
        """The training half of `regenerate`: the moments weigh the sources by rows, or by `weights`."""
        r, args, self.sources = self.r, self.args, sources
        # with --compile, on a GPU, as CUDA graphs; else as they are
        step_fn, average_fn = r.capture(self.train_step), r.capture(lambda: self.ema.update(self.net))
        for step in r.phase("generator", (k + 1) * args.diffusion_steps):
            if step == k * args.diffusion_steps:
                self.restart(sources, weights)
            r.log(step, step_fn())
            if (step - k * args.diffusion_steps) % edm.EMA.EVERY == 0:
                average_fn()

    def restart(self, sources: list[ReplayBuffer], weights: list[float] | None) -> None:
        """Before a training: fresh network and optimizer, in place (U31), moments of the sources."""
        tables = [b.table[: b.rows] for b in sources]
        self.moments.fit([t[:, : self.features] for t in tables], weights)
        rewards = torch.cat([t[:, self.obs_dim + self.act_dim] for t in tables])
        self.bounds.copy_(torch.stack(rewards.aminmax()))
        self.net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        self.ema.restart()
        self.count.zero_()
        for state in self.opt.state.values():
            for x in state.values():
                x.zero_()

    def draw(self) -> tuple[torch.Tensor, ...]:
        """For a gradient step: rows (B, D) in training units, and conditions for the network (none here)."""
        return (union_rows(self.sources, self.args.diffusion_batch)[0][:, : self.features],)

    def train_step(self) -> dict[str, torch.Tensor]:
        """One gradient step of the EDM: cosine learning rate, gradient norm at most 1.  [SynthER]"""
        decay = 1 + torch.cos(self.count * (math.pi / self.args.diffusion_steps))
        self.opt.param_groups[0]["lr"].copy_(0.5 * self.args.diffusion_lr * decay)
        self.count.add_(1)
        rows, *condition = self.draw()
        x, sigma = self.moments.normalize(rows), edm.draw_sigma(len(rows), rows.device)
        # on a GPU in bfloat16, here and in sample_step; the learner's losses stay in float32: U35
        with torch.autocast("cuda", torch.bfloat16, enabled=rows.is_cuda, cache_enabled=False):
            loss = self.loss(self.net, x, sigma, *condition)
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.opt.step()
        return {"loss/diffusion": loss.detach()}

    # -- sampling --

    def denoiser(self, rows: int, *condition: torch.Tensor) -> edm.Denoiser:
        """D of the averaged network for a chunk of rows."""
        ones = torch.ones(rows, device=self.r.device)
        return lambda x, sigma: self.denoise(self.ema.module, x, sigma * ones, *condition)

    def noise(self, rows: int) -> torch.Tensor:
        """x at the first noise level of the grid, (rows, D)."""
        return edm.SIGMA_MAX * torch.randn(rows, self.features, device=self.r.device)

    def begin(self, n: int) -> tuple[edm.Denoiser, torch.Tensor, int]:
        """For n samples: the denoiser, x (n, D) at a noise level of the grid, and that level's index."""
        return self.denoiser(n), self.noise(n), 0

    @torch.no_grad()
    def sample_step(self, gradient: edm.Denoiser | None = None) -> dict[str, torch.Tensor]:
        """A chunk of generated rows (sample_batch, D), as they come; guided by an energy, D - σ² `gradient` for D."""
        args = self.args
        denoiser, x, first = self.begin(min(args.sample_batch, args.synthetic_rows))
        denoiser = edm.with_energy(denoiser, gradient) if gradient else denoiser
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
            x = edm.sample(denoiser, x, args.sample_steps, args.sample_churn, first)
        return {"rows": self.moments.denormalize(x)}

    def refill(self, k: int, gradient: edm.Denoiser | None = None) -> None:
        """The sampling half of `regenerate`; the `gradient` of an energy guides it."""
        r, args = self.r, self.args
        if args.terminal_flag == "classifier":
            self.tree = self.terminal_tree()
        chunks = -(-args.synthetic_rows // args.sample_batch)
        sample_fn = r.capture(lambda: self.sample_step(gradient))
        for chunk in r.phase("sampling", (k + 1) * chunks):
            if chunk == k * chunks:
                self.synthetic.clear()
                self.totals.zero_()
            self.keep(sample_fn()["rows"])
        rows, _, _, dropped = self.totals.tolist()
        if dropped > 0.01 * rows:
            raise FloatingPointError(f"{dropped:.0f} of {rows:.0f} generated rows are not finite")

    def keep(self, rows: torch.Tensor) -> None:
        """Put generated rows into the buffer: finite ones, actions in the box, rewards in their range (D22), a flag."""
        joint = self.args.terminal_flag == "joint"
        rows = rows[: self.args.synthetic_rows - int(self.totals[0])]
        self.totals[0] += len(rows)
        finite, widths = rows.isfinite().all(1), self.synthetic.widths
        obs, actions, rewards, next_obs, *flag = rows[finite].split(widths if joint else widths[:-1], 1)
        if joint:
            terminated = flag[0] > 0.5
        else:  # drawn with the tree's probability: D21
            share = leaf_shares(self.tree, next_obs)[:, None]
            terminated = torch.rand_like(share) < share
        clipped, outside = actions.abs() > 1, (rewards < self.bounds[0]) | (rewards > self.bounds[1])
        self.totals[1:] += torch.stack([clipped.float().mean(1).sum(), outside.sum(), (~finite).sum()])
        parts = obs, actions.clamp(-1, 1), rewards.clamp(*self.bounds), next_obs, terminated.float()
        self.synthetic.append(torch.cat(parts, 1))

    def terminal_tree(self) -> tuple | float:
        """p(terminal | s') of all real rows, whatever the model learned from; both classes weigh the same: D21."""
        rows = torch.cat([b.table[: b.rows] for b in self.real])
        next_obs, ends = rows[:, -1 - self.obs_dim : -1], rows[:, -1] > 0.5
        weight = torch.where(ends, 1 / ends.sum(), 1 / (~ends).sum()).double()
        return grow_tree(next_obs, ends, weight, self.TREE_DEPTH)


def grow_tree(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, depth: int) -> tuple | float:
    """A classification tree: x (N, W), y (N,) bool -> share of y (a leaf), or (feature, cut, below, above): D21.

    Each split has the least Gini impurity under `weight` (N,); its cut lies halfway between two rows.
    """
    best = (math.inf, 0, 0.0)  # impurity, feature, cut
    mixed = depth > 0 and y.any() and not y.all()
    for k in range(x.shape[1]) if mixed else ():
        values, order = x[:, k].sort()
        yes, no = ((weight * side)[order].cumsum(0) for side in (y, ~y))
        yes_above, no_above = yes[-1] - yes, no[-1] - no
        impurity = yes * no / (yes + no) + yes_above * no_above / (yes_above + no_above).clamp(min=1e-30)
        i = int(torch.where(values[1:] > values[:-1], impurity[:-1], math.inf).argmin())
        if values[i + 1] > values[i] and impurity[i] < best[0]:
            best = (impurity[i].item(), k, 0.5 * (values[i] + values[i + 1]).item())
    below = x[:, best[1]] <= best[2]
    if best[0] == math.inf or below.all():  # no cut, or none between neighbouring floats
        return y.float().mean().item()
    return *best[1:], *(grow_tree(x[side], y[side], weight[side], depth - 1) for side in (below, ~below))


def leaf_shares(tree: tuple | float, x: torch.Tensor) -> torch.Tensor:
    """Share of y in the leaf of each row: x (N, W) -> (N,)."""
    if isinstance(tree, float):
        return torch.full_like(x[:, 0], tree)
    feature, cut, below, above = tree
    return torch.where(x[:, feature] <= cut, leaf_shares(below, x), leaf_shares(above, x))


# --- end shared: synther.generator ---


# NEW: the generator of both labels
# --- shared: iql_cfdg.generator ---
class LabelledGenerator(Generator):
    """A Generator of both labels. Of the rows it keeps, the first `boundary` have the online label, the rest the other.

    `boundary` is a 0-d device tensor, so that a captured step draws each label alone, however many rows were dropped.
    """

    def __init__(self, r: run.Run, args: Args, offline: ReplayBuffer, online: ReplayBuffer):
        sizes = args.diffusion_width, args.diffusion_depth, args.diffusion_time_dim
        super().__init__(r, args, LabelledNet(Generator.features(args, offline), *sizes), [offline, online])
        self.online_rows = round(online_label_share(args) * args.synthetic_rows)  # to generate: U43
        self.boundary = torch.zeros((), dtype=torch.int64, device=r.device)
        n = args.diffusion_batch
        self.labels = torch.tensor([OFFLINE] * (n // 2) + [ONLINE] * (n - n // 2), device=r.device)

    def state(self) -> dict:
        return super().state() | {"generator_boundary": self.boundary}

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B, D), half of each source (U42), and labels (B,), dropped to ∅ with p_uncond.  [§3.2]"""
        half = self.args.diffusion_batch // 2
        sizes = half, self.args.diffusion_batch - half
        rows = [b.table.index_select(0, b.draw(n)) for b, n in zip(self.real, sizes, strict=True)]
        p_uncond = self.args.label_dropout if self.args.labels else 1.0  # --no-labels: U46
        dropped = torch.rand(len(self.labels), device=self.labels.device) < p_uncond
        return torch.cat(rows)[:, : self.features], torch.where(dropped, NULL, self.labels)

    def next_labels(self, n: int) -> torch.Tensor:
        """Labels (n,) of the next rows to be generated: ONLINE until there are `online_rows`, then OFFLINE."""
        place = self.totals[0] + torch.arange(n, device=self.totals.device)
        return torch.where(place < self.online_rows, ONLINE, OFFLINE)

    def begin(self, n: int) -> tuple[edm.Denoiser, torch.Tensor, int]:
        """(1 + w) D(x; σ, c) - w D(x; σ, ∅), noise, and the first step.  [Eq. 7], D43"""
        labels = self.next_labels(n)
        denoiser = self.denoiser(n, torch.full_like(labels, NULL))
        if self.args.labels:
            denoiser = edm.with_guidance(self.denoiser(n, labels), denoiser, self.args.guidance_w)
        return denoiser, self.noise(n), 0

    def keep(self, rows: torch.Tensor) -> None:
        """As every Generator; counts the online-label rows that stay."""
        stay = rows.isfinite().all(1) & (self.next_labels(len(rows)) == ONLINE)
        self.boundary.mul_(self.totals[0] > 0).add_(stay.sum())
        super().keep(rows)

    def refill(self, k: int, gradient: edm.Denoiser | None = None) -> None:
        super().refill(k, gradient)
        end, rows = int(self.boundary), self.synthetic.rows
        if not end or (rows == end and label_counts(self.args)[1]):
            raise FloatingPointError("no generated row of one label is finite")

    def sample(self, n_online: int, n_offline: int) -> Batch:
        """Kept rows: n_online of the online label, then n_offline of the other, uniform with replacement."""
        index = self.synthetic.draw(n_online, self.boundary)
        if n_offline:
            others = self.synthetic.draw(n_offline, self.synthetic.size - self.boundary)
            index = torch.cat([index, self.boundary + others])
        return self.synthetic.take(index)


# --- end shared: iql_cfdg.generator ---


# From here to `train`: networks, losses, optimizer of iql.py, as they are there.
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
    counts = batch_counts(args)  # NEW
    run.check_batch(args, own=counts[0], dataset=counts[1], generated=counts[2])
    if args.labels and args.guidance_w > 0 and args.label_dropout == 0:
        raise run.UsageError("--label-dropout", 0.0, "more than 0, or --guidance-w 0: w needs the null label")
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    moments = dataset.moments() if args.normalize_obs else None
    reward_scale = 1_000 / dataset.return_range() if args.normalize_reward else 1.0  # D2
    units = data.Units(reward_scale, args.reward_bias, moments)
    offline = dataset.buffer(units, r.device)
    online = offline.like(args.online_steps)
    known = offline.subset(dataset.known)  # NEW: rows whose s' is known: D24
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

    # NEW: the model
    generator = LabelledGenerator(r, args, known, online)
    if counts[3] and not 0 < generator.online_rows < args.synthetic_rows:
        raise run.UsageError("--synthetic-rows", args.synthetic_rows, "enough for rows of both labels")
    added = generator.state()
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

    # online: one environment step, then utd gradient steps on half dataset, half own experience
    def online_step(mixed: bool = False) -> dict[str, torch.Tensor]:
        half = args.batch_size - n_offline, n_offline  # NEW
        n_own, n_dataset, *n_labels = counts if mixed else half
        index = offline.draw(n_dataset), online.draw(n_own)
        batch = mix(offline.take(index[0]), online.take(index[1]))
        if mixed:  # NEW: losses of generated rows are those of real ones
            batch = mix(batch, generator.sample(*n_labels))
        loss, logs = compiled_losses(nets, batch, args)
        update(nets, opt, loss, args.polyak)
        return logs

    # NEW: the model learns at these environment steps, after the warm-up and while steps are left: U45
    times = {k * args.online_steps // args.regenerations for k in range(1, args.regenerations)}
    times = sorted(t for t in times if t >= max(args.warmup_steps, 1))
    real_step, mixed_step = r.capture(online_step), r.capture(partial(online_step, mixed=True))
    for k, until in enumerate([*times, args.online_steps]):
        step_fn = mixed_step if k else real_step
        for step in r.phase("online", until):
            if episode := interaction.step(explore):
                r.record(step + 1, episode)
            if step >= args.warmup_steps:
                for _ in range(args.utd):
                    logs = step_fn()
                r.log(step, logs)
            if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
                r.record(step + 1, evaluate(act, r.device))
        if until < args.online_steps and f"report {k}" not in r.passed:
            generator.regenerate(k, [known, online], weights=[1, 1])  # alike in the moments: U42
            if r.once(f"report {k}"):
                r.record(until, judge.labelled_rows(generator, k, task, units, offline, online))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
