"""CFDG on APL: a third of each batch is generated, of recent rows and of all rows alike, pessimism as they have it.

Paper    Huang, Liu, Zhang, Yu, Li, "Offline-to-Online Reinforcement Learning with Classifier-Free Diffusion Generation"
         (CFDG), ICML 2025, no code; the EDM: Karras et al., NeurIPS 2022, arXiv 2206.00364; network, training: SynthER,
         arXiv 2303.06614, code conglu1997/SynthER. Backbone: apl.py, line for line outside the NEW parts.
Idea     As iql_cfdg.py: a model that knows own rows from the dataset's makes more of both, mostly of the own kind.
         APL's batches are of one kind each, so generated rows join either and are learned from as it is.
Symbols  F LabelledNet | D denoiser | c label | ∅ NULL | w guidance_w | p_uncond label_dropout | r synthetic_frac |
         D_on_syn, D_off_syn rows of the label ONLINE, OFFLINE | N sample_steps | S_churn sample_churn |
         Q qf, five | Q̂ q_target | λ 0 on recent rows, else 1 | α_cql cql_weight | p fifo_prob
Read     Args; NEW: LabelledNet; TransitionNet, Generator; LabelledGenerator; train.
         From apl.py: losses, draw_oorb (a batch of recent own rows or of all rows), update, learn.
Notes    As in apl.py: D1 one step for all losses, D2 a sum of MSEs, D5 log π of data, D6 D92 networks and their start,
            D90 targets start as copies, D91 updates after every step instead of blocks, D93 1M offline and 0.1M online
            steps, D94 episodes of an evaluation, U1 sizes of the embedded tasks, U3 the optimizer goes on, U90 other
            domains than locomotion have the same settings.
         As in every file with generated rows, reasons in iql_cfdg.py: D20 all but the flag is normalised, D21 the flag
            is drawn with what a tree says of s', D22 actions clipped to the box, rewards to the range learned from,
            D24 rows without a known s' are not learned from, U31 each training is from scratch, U35 bfloat16 on a GPU.
         As in iql_cfdg.py, reasons there: D41 "100K epochs" are gradient steps, D42 new rows replace the old, D43 w is
            Eq. 7's, U40 w and p_uncond, U41 the label's way in, U42 halves of the model's batch, U43 rows per
            regeneration, U45 when the model learns: 10,000 steps apart, as Table 5 has it for APL; U46 "w/o guidance".
         U44 a batch keeps its size: 256 = 171 real, all recent or from all there are, + 68 + 17 generated.
         U91 "synthetic data can be seen as part of online data or offline data" [§3.3] may mean that each kind of batch
            takes its own label. Here both take both, 8 : 2, and the batch's coin decides on pessimism for all its rows.
Metrics  those of apl.py; loss/diffusion (< 1); syn/* of each regeneration: common/judge.py, where syn/js_* is Table 2's
         and, if generation helps, below syn/dataset_js_*, its "Offline"; synthetic-<k>.npz: 2,000 rows of each kind.
Run      python algorithms/apl_cfdg.py --env hopper-medium-v2 --seed 0
         no guidance --guidance-w 0 | nor labels --no-labels | no offline augmentation --online-label-frac 1
         the common start: --from-offline runs/apl/hopper-medium-v2/seed0 | cheaper: --sample-steps 32 --sample-churn 0
Cost     reacher-mini-v0 from an offline phase: four CPU minutes; published sizes want a GPU (unmeasured).
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

from common import data, edm, judge, run
from common.buffer import Batch, ReplayBuffer, mix, union_rows
from common.run import Count, Fraction, Natural, Portion, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [§4.1]; a tenth in the code: D93
    online_steps: Natural = 100_000  # environment steps [§4.1]
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
    "antmaze-": dict(eval_every=10_000, eval_episodes=100),  # [CORL]; APL has locomotion alone: U90
    "maze2d-": dict(eval_episodes=100),  # [CORL]
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, normalize_obs=True,
        utd=2, fifo_rows=1_200, fifo_from=600,
        regenerations=3, synthetic_rows=10_000, diffusion_steps=4_000, diffusion_width=256, diffusion_depth=3,
        diffusion_time_dim=64, diffusion_lr=1e-3, sample_steps=32, sample_churn=0.0, sample_batch=5_000,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=8_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50, cql_weight=2.0),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "policy_lr", "critic_lr", "hidden", "critic_layers",
    "n_critics", "critic_subset", "cql_weight", "cql_n_actions", "normalize_obs",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "fifo_prob > 0": ("fifo_rows", "fifo_from"),
    "labels": ("guidance_w", "label_dropout", "online_label_frac"),
}


# NEW: CFDG's own, from here to apl.py's blocks: labels; then the generator.
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


# From here to `train`: networks, losses, optimizer of apl.py, as they are there.
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
    n_labels = label_counts(args)  # NEW
    n_synthetic = sum(n_labels)
    run.check_batch(args, real=args.batch_size - n_synthetic, generated=n_labels[0])
    if args.labels and args.guidance_w > 0 and args.label_dropout == 0:
        raise run.UsageError("--label-dropout", 0.0, "more than 0, or --guidance-w 0: w needs the null label")
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    units = data.Units(moments=dataset.moments() if args.normalize_obs else None)
    offline = dataset.buffer(units, r.device)
    online = offline.like(args.online_steps)
    known = offline.subset(dataset.known)  # NEW: rows whose s' is known: D24
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

    # NEW: the model
    generator = LabelledGenerator(r, args, known, online)
    if n_labels[1] and not 0 < generator.online_rows < args.synthetic_rows:
        raise run.UsageError("--synthetic-rows", args.synthetic_rows, "enough for rows of both labels")
    added = generator.state()
    r.register(nets=nets, opt=opt, online=online, interaction=interaction, **added)
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
    def online_step(recent: bool, mixed: bool = False) -> dict[str, torch.Tensor]:
        n_real = args.batch_size - n_synthetic if mixed else args.batch_size  # NEW
        batch = draw_oorb(offline, online, n_real, recent, args)
        if mixed:  # NEW: generated rows are treated like the real ones beside them, of either kind: U91
            batch = mix(batch, generator.sample(*n_labels))
        return learn(batch, 0.0 if recent else args.cql_weight)  # no pessimism on recent rows [CFDG Eq. 3]

    # NEW: the model learns at these environment steps, after the warm-up and while steps are left: U45
    times = {k * args.online_steps // args.regenerations for k in range(1, args.regenerations)}
    times = sorted(t for t in times if t >= max(args.warmup_steps, 1))
    kinds = [(recent, mixed) for recent in (True, False) for mixed in (True, False)]
    step_fns = {kind: r.capture(partial(online_step, *kind)) for kind in kinds}
    for k, until in enumerate([*times, args.online_steps]):
        for step in r.phase("online", until):
            if episode := interaction.step(explore):
                r.record(step + 1, episode)
            if step >= args.warmup_steps:
                for i in range(args.utd):
                    recent = toss(args, online, step * args.utd + i)
                    logs = step_fns[recent, k > 0]()  # NEW
                r.log(step, logs | {"apl/recent": float(recent)})
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
