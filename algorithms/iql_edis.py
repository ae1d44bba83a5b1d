"""EDIS on IQL: a diffusion model of all data, guided by three energies to rows that are like own ones.

Paper    Liu, Liu, Jiang, Chen, Zhang, Chen, Yu, "Energy-Guided Diffusion Sampling for Offline-to-Online Reinforcement
         Learning" (EDIS), ICML 2024, arXiv 2407.12448, code liuxhym/EDIS; the EDM: Karras et al., NeurIPS 2022, arXiv
         2206.00364. Backbone: iql.py, line for line outside the NEW parts.
Idea     A diffusion model learns dataset and own transitions. Energies, each learned as a contrast, pull what it makes
         to the states now visited (E_s), the policy's actions (E_π) and the dynamics (E_T): low E is wanted; the
         sampler follows D - σ² Σ λ ∇E in place of D. Batches are own rows and generated ones.
Symbols  F TransitionNet | D denoiser | σ noise level | N sample_steps | S_churn sample_churn | E TransitionEnergy |
         λ state_energy, policy_energy, dynamics_energy | K negatives per positive
Read     Args; NEW: TransitionEnergy, info_nce, Energies; TransitionNet, Generator; train.
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
         Of EDIS. Its code trains other energies than it describes; here are those described, none of the code's:
         D40 noise levels, code: trains E_s at σ = 80, the others at two, asks at 128; here: all of the sampler's grid.
         D41 guidance, paper: each energy has own features, and a block of the gradient, exact if blocks are independent
            (s moved by 1, s' correlated 0.95: (0.76, 0.46), not (1, 0.95)): --energy-form paper. Here: each exact, then
            summed, all features: E_T = -log real / model of noised rows; E_s, E_π as weights w of clean real rows, then
            -log E[w | x_σ] (Lu et al., arXiv 2304.12824). Code omits σ of σ ∇E: its λ (2, 0.1, 0.1) go with that.
         D42 inputs, code: raw rows, step index; here: normalised, times c_in, ln σ / 4; E times c_in, so σ² ∇E is O(1).
         D43 negatives, code: for E_π, E_T all features overwritten, no samples. Here, paper form: the model's rows (a
            joint ratio has the conditional's gradient in its last block); row form, E_s, E_π: real rows, as a weight
            can tell these apart without telling what is generated.
         D44 groups, code: half of another state, of E_s one softmax over 256 + 2,560; here: 1 positive, 10 negatives.
         D45 learner: iql.py's with its presets, so that a difference to it is the method's. Code: β 10, τ per dataset,
            states normalised, no dropout, 100 episodes.
         D46 code: generated rows in 20 updates per regeneration, 400 of 200,000, unguided by default; here: all.
         D47 code: first regeneration with one own transition, batches of both buffers; here: after the warm-up, without
            updates before; batches of generated and own rows, none of the dataset, as EDIS on Cal-QL.
         U40 1,000 updates of each energy per regeneration (code: 20 cannot fit); nets and Adam persist [code].
         U41 positives: of E_π the policy's actions at the negatives' states; real rows are of both buffers.
         U42 the clip at 10 √D [code] is on the term added to the slope, σ Σ λ ∇E, all energies together.
         U45 tasks that the code has no file for (Adroit-cloned): share 0.2, 30,000 model steps; embedded: share 0.5.
Metrics  those of iql.py; loss/diffusion (< 1); loss/{state,policy,dynamics,tilt}_energy (chance 2.40); of each
         regeneration energy/effective, (Σ w)² / Σ w² as a share of real rows (small: few stand for all), energy/clipped
         (about 0) and, unguided and guided, *_js_states, *_policy_gap, *_sim_error, syn/*: common/judge.py.
         synthetic-<k>.npz has 2,000 rows of each kind.
Run      python algorithms/iql_edis.py --env hopper-medium-v2 --seed 0
         without an energy --state-energy 0 | --policy-energy 0 | --dynamics-energy 0 | as described --energy-form paper
         EDIS as DARE ran it --diffusion-steps 50000 | four times cheaper sampling --sample-steps 32 --sample-churn 0
         the common start: --from-offline runs/iql/hopper-medium-v2/seed0
Cost     reacher-mini-v0 from an offline phase: 2 CPU minutes; published sizes want a GPU (not measured there).
Fails    to do much beside taking the dataset from its learner: on reacher-mini-v0 IQL gains most of it by that
         alone (README: controls). Guidance moves s' away from the simulator's, as in edis.py.
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

from common import data, edm, judge, run
from common.buffer import Batch, ReplayBuffer, mix, union_rows
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
    inv_temp: Weight = 3.0  # β [DARE Table 5]: D45
    lr: Positive = 3e-4  # Adam, all networks [DARE Table 5]
    hidden: Count = 256  # width of the hidden layers [DARE Table 5]
    normalize_reward: bool = False  # r · 1000 / (largest - smallest episode return): D2
    normalize_obs: bool = False  # (obs - mean) / (std + 1e-3) of the dataset [CORL]
    reward_bias: Number = 0.0  # added to rewards in training, after scaling [PEX: AntMaze]
    dropout: Portion = 0.0  # of the actor's hidden units in its losses [CORL: Adroit]
    # online
    warmup_steps: Natural = 5_000  # environment steps without updates, counted in online_steps [PEX]
    utd: Count = 1  # gradient steps per environment step
    # NEW: synthetic rows
    terminal_flag: Literal["classifier", "joint"] = "classifier"  # from s', or as a feature of the rows: D21
    synthetic_frac: Fraction = 0.2  # share of a batch that is generated [code of EDIS]: D46, U45
    regenerate_every: Count = 10_000  # environment steps [code of EDIS]
    synthetic_rows: Count = 100_000  # rows per regeneration [code of EDIS]
    # NEW: diffusion model
    diffusion_steps: Count = 30_000  # gradient steps per regeneration [code of EDIS]
    diffusion_batch: Count = 256  # rows [code of EDIS]
    diffusion_lr: Positive = 3e-4  # Adam, cosine to 0 within a regeneration [SynthER, EDIS]
    diffusion_width: Count = 1_024  # of the residual blocks [code of EDIS]
    diffusion_depth: Natural = 6  # residual blocks [code of EDIS]
    diffusion_time_dim: Count = 256  # of the time embedding [code of EDIS]
    sample_steps: Several = 128  # noise levels, N [code of EDIS]
    sample_churn: Weight = 80.0  # S_churn; 0 = deterministic, which 32 levels need [code of EDIS]
    sample_batch: Count = 10_000  # rows generated at once [code of EDIS]
    # NEW: energies
    energy_form: Literal["row", "paper"] = "row"  # what energies see and their gradients act on: D41
    state_energy: Weight = 1.0  # λ of E_s; 0 = without: D41
    policy_energy: Weight = 1.0  # λ of E_π; 0 = without: D41
    dynamics_energy: Weight = 1.0  # λ of E_T; 0 = without: D41
    energy_updates: Count = 1_000  # gradient steps of each energy per regeneration: U40
    energy_groups: Count = 256  # positives per gradient step [code of EDIS]: D44
    energy_lr: Positive = 1e-3  # Adam [code of EDIS]
    energy_width: Count = 256  # of the three hidden layers [code of EDIS]
    energy_pool: Count = 10_000  # unguided rows per regeneration, negatives: D43


ENV_PRESETS: dict[str, dict] = {  # prefix of --env -> what differs from Args; later rows win
    "antmaze-": dict(  # [IQL App. B; episodes: CORL]
        expectile=0.9, inv_temp=10.0, reward_bias=-1.0, eval_every=10_000, eval_episodes=100,
        diffusion_steps=50_000,  # [code of EDIS]
    ),
    **{k: dict(expectile=0.8, dropout=0.1, normalize_obs=True)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [CORL]
    "maze2d-": dict(normalize_obs=True, eval_episodes=100),  # [CORL, offline IQL]
    # shares and model steps of the code of EDIS; 0.2 and 30,000 in its other files
    "antmaze-umaze-diverse": dict(synthetic_frac=0.9),
    "antmaze-large-": dict(synthetic_frac=0.1, diffusion_steps=30_000),
    "halfcheetah-medium-replay-v2": dict(synthetic_frac=0.8, diffusion_steps=50_000),
    "halfcheetah-medium-v2": dict(synthetic_frac=0.5, diffusion_steps=50_000),
    "halfcheetah-medium-expert-v2": dict(synthetic_frac=0.7),
    "hopper-random-v2": dict(synthetic_frac=0.8),
    "hopper-medium-expert-v2": dict(synthetic_frac=0.1),
    "walker2d-random-v2": dict(synthetic_frac=0.5),
    "walker2d-medium-replay-v2": dict(synthetic_frac=0.8, diffusion_steps=50_000),
    "walker2d-medium-expert-v2": dict(synthetic_frac=0.5),
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, lr=5e-4, polyak=0.01,
        normalize_obs=True, normalize_reward=True,
        regenerate_every=2_000, synthetic_rows=10_000, diffusion_steps=4_000, diffusion_width=256, diffusion_depth=3,
        diffusion_time_dim=64, diffusion_lr=1e-3, sample_steps=32, sample_churn=0.0, sample_batch=5_000,
        energy_width=64, energy_pool=5_000, synthetic_frac=0.5,
    ) for k in ("hopper-mini", "reacher-mini")},
    "hopper-mini-v0": dict(offline_steps=15_000, eval_episodes=20),
    "reacher-mini-v0": dict(offline_steps=4_000, eval_episodes=50),
}  # fmt: skip
OFFLINE_SETTINGS = (  # what an offline checkpoint depends on, beside the dataset
    "offline_steps", "batch_size", "gamma", "polyak", "expectile", "inv_temp", "lr", "hidden",
    "normalize_reward", "normalize_obs", "reward_bias", "dropout",
)  # fmt: skip
NEEDS = {  # condition -> settings that have no effect without it: a flag for one is refused then
    "state_energy + policy_energy + dynamics_energy > 0": (
        "energy_form", "energy_updates", "energy_groups", "energy_lr", "energy_width", "energy_pool",
    ),
}  # fmt: skip


# NEW: the energies. From here to iql.py's blocks, the method.
# --- shared: edis.energies ---
class TransitionEnergy(nn.Module):
    """E(x; σ), low where x is wanted: x (..., W) at noise level sigma (..., 1) -> (...).  [EDIS; inputs, scale: D42]"""

    def __init__(self, features: int, width: int):
        super().__init__()
        sizes = (features + 1, width, width, width, 1)
        layers = [x for i, o in pairwise(sizes) for x in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        scale, c_noise = (1 + sigma.square()).rsqrt(), (sigma.log() / 4).expand(*x.shape[:-1], 1)
        return (scale * self.net(torch.cat([scale * x, c_noise], -1))).squeeze(-1)


def info_nce(energy: torch.Tensor) -> torch.Tensor:
    """E+ + log Σ_group e^{-E}, mean over groups: energy (B, 1 + K), the positive first -> ().  [EDIS, InfoNCE]

    Least at E = -log p_positive / p_negative + c, with one c for each noise level, as a group has one: D44.
    """
    return (energy[:, 0] + torch.logsumexp(-energy, 1)).mean()


class Energies:
    """The energies, each -log of a ratio of densities that a contrast learns, and guidance by their gradients: D41.

    name      positives over                negatives, row | paper form   sees            gradient in, row | paper form
    state     own rows                      real | the model's            s               - | s
    policy    the policy's actions there    real | the model's            s, a            - | a
    dynamics  real rows                     the model's                   all | s, a, s'  all | s'
    tilt      real rows drawn by weight     real (row form alone)         all             all

    Row form: clean E_s and E_π are `weighers` of real rows, w = e^{-λ_s E_s - λ_π E_π}; E_T and the tilt, which is
    -log E[w | x_σ], are `guides`, of noised rows. Paper's form: all three are guides. Real rows are of both buffers.
    """

    NEGATIVES = 10  # per positive [code of EDIS]
    CANDIDATES = 20  # real rows for each that is drawn by weight

    def __init__(self, generator: "Generator", act: Callable):
        """`act`: obs (B, O) in training units -> actions (B, A) of the current policy."""
        self.r, self.args, self.generator, self.act = generator.r, generator.args, generator, act
        self.sources, self.online = generator.real, generator.real[1]  # both buffers: U41
        args, device, o, a = self.args, self.r.device, generator.obs_dim, generator.act_dim
        index = torch.arange(generator.features, device=device)
        s, action, next_s = index[:o], index[o : o + a], index[o + a + 1 : 2 * o + a + 1]
        row = args.energy_form == "row"
        of_dynamics = index if row else torch.cat([s, action, next_s])
        self.seen = {"state": s, "policy": index[: o + a], "dynamics": of_dynamics, "tilt": index}
        # features that the gradient acts on
        self.moved = self.seen if row else {"state": s, "policy": action, "dynamics": next_s}
        scales = dict(state=args.state_energy, policy=args.policy_energy, dynamics=args.dynamics_energy)
        scales = {k: v for k, v in scales.items() if v > 0}
        self.weighers = {k: v for k, v in scales.items() if row and k != "dynamics"}  # λ
        self.guides = {k: v for k, v in scales.items() if k not in self.weighers}
        if self.weighers:
            self.guides["tilt"] = 1.0  # exact as it is: w has the scales
        nets = {k: TransitionEnergy(len(x), args.energy_width) for k, x in self.seen.items()}
        self.nets = nn.ModuleDict(nets).to(device)
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.opt = torch.optim.Adam(self.nets.parameters(), lr=args.energy_lr, **adam)
        self.grid = torch.tensor(edm.sigma_grid(args.sample_steps)[:-1], device=device)
        self.pool = torch.zeros(args.energy_pool, len(index), device=device)  # normalised, unguided
        self.wanted = torch.zeros_like(self.pool)  # normalised real rows, as often as w says
        self.effective = torch.zeros((), device=device)  # (Σ w)² / Σ w², as a share of rows
        self.guided = torch.zeros(2, device=device)  # evaluations of the guidance, how many of them clipped
        self.losses = self.r.compiled(self.group_losses)

    def state(self) -> dict:
        """What a checkpoint holds, by name."""
        names = ("nets", "opt", "pool", "wanted", "effective", "guided")
        return {f"energy_{k}": getattr(self, k) for k in names}

    def regenerate(self, k: int) -> None:
        """The k-th time: the model from scratch, its pool, the energies on from where they were, guided rows."""
        self.generator.learn(k, self.sources)
        if self.guides:
            self.fill_pool(k)
        self.learn("ratios", k, [*self.weighers])
        self.learn("energies", k, [*self.guides])
        self.generator.refill(k, self.gradient)

    # -- what the energies learn from: normalised rows (n, D) --

    def real(self, n: int, sources: list[ReplayBuffer]) -> torch.Tensor:
        """Rows of buffers."""
        return self.generator.moments.normalize(union_rows(sources, n)[0][:, : self.generator.features])

    def made(self, n: int) -> torch.Tensor:
        """Samples of the model alone."""
        return self.pool[torch.randint(len(self.pool), (n,), device=self.pool.device)]

    def with_policy(self, x: torch.Tensor) -> torch.Tensor:
        """The same rows with actions of the policy."""
        moments, o = self.generator.moments, self.generator.obs_dim
        end = o + self.generator.act_dim
        actions = self.act(moments.denormalize(x)[:, :o])
        return torch.cat([x[:, :o], (actions - moments.mean[o:end]) / moments.std[o:end], x[:, end:]], 1)

    @torch.no_grad()
    def groups(self, name: str) -> torch.Tensor:
        """Groups (B, 1 + K, W) of what an energy sees, the positive first; all rows drawn apart: D43, D44."""
        b, k = self.args.energy_groups, self.NEGATIVES
        from_model = name in self.guides and name != "tilt"

        def negatives(n: int) -> torch.Tensor:
            return self.made(n) if from_model else self.real(n, self.sources)

        if name == "state":
            positives = self.real(b, [self.online])
        elif name == "policy":
            positives = self.with_policy(negatives(b))  # at the negatives' states: U41
        elif name == "dynamics":
            positives = self.real(b, self.sources)
        else:
            positives = self.wanted[torch.randint(len(self.wanted), (b,), device=self.wanted.device)]
        x = torch.cat([positives[:, None], negatives(b * k).unflatten(0, (b, k))], 1)
        return x[..., self.seen[name]]

    @torch.no_grad()
    def pool_step(self) -> dict[str, torch.Tensor]:
        """A chunk of samples of the model alone, normalised, (chunk, D)."""
        args, g = self.args, self.generator
        rows = min(args.sample_batch, args.energy_pool)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.pool.is_cuda, cache_enabled=False):
            x = edm.sample(g.denoiser(rows), g.noise(rows), args.sample_steps, args.sample_churn)
        return {"rows": x}

    def fill_pool(self, k: int) -> None:
        """The k-th samples of the model alone, which the real rows are contrasted with."""
        size = min(self.args.sample_batch, self.args.energy_pool)
        sample_fn, chunks = self.r.capture(self.pool_step), -(-self.args.energy_pool // size)
        for chunk in self.r.phase("pool", (k + 1) * chunks):
            first = (chunk - k * chunks) * size
            self.pool[first : first + size] = sample_fn()["rows"][: self.args.energy_pool - first]

    @torch.no_grad()
    def weigh(self) -> None:
        """Fill `wanted` with real rows drawn with chances ∝ w = e^{-Σ λ E}, from many drawn uniformly."""
        rows, clean = self.real(self.CANDIDATES * len(self.wanted), self.sources), self.grid[-1:]
        total = sum(v * self.nets[k](rows[:, self.seen[k]], clean) for k, v in self.weighers.items())
        chances = torch.softmax(-total.double(), 0)
        self.effective.copy_(1 / (chances.square().sum() * len(rows)))
        drawn = torch.rand(len(self.wanted), device=rows.device, dtype=torch.float64)
        index = torch.searchsorted(chances.cumsum(0), drawn).clamp(max=len(rows) - 1)
        self.wanted.copy_(rows[index])

    # -- learning and guiding --

    def group_losses(self, groups: dict, sigmas: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of InfoNCE over the energies, and logs: groups (B, 1 + K, W), sigmas (B, 1, 1).  [EDIS]"""
        total, logs = 0.0, {}
        for name, x in groups.items():
            loss = info_nce(self.nets[name](x + sigmas[name] * torch.randn_like(x), sigmas[name]))
            total, logs[f"loss/{name}_energy"] = total + loss, loss.detach()
        return total, logs

    def energy_step(self, names: list[str]) -> dict[str, torch.Tensor]:
        """One gradient step of each; guides at noise levels of the sampler's own, the others at the least: D40."""
        groups, sigmas = {k: self.groups(k) for k in names}, {}
        for name, x in groups.items():
            grid = self.grid if name in self.guides else self.grid[-1:]
            sigmas[name] = grid[torch.randint(len(grid), (len(x), 1, 1), device=x.device)]
        loss, logs = self.losses(groups, sigmas)
        self.opt.zero_grad(set_to_none=True)
        loss.backward()  # disjoint parameters
        self.opt.step()
        return logs

    def learn(self, phase: str, k: int, names: list[str]) -> None:
        """The k-th updates of these energies; those that weigh come before what learns from rows drawn by weight."""
        updates = self.args.energy_updates if names else 0
        step_fn = self.r.capture(lambda: self.energy_step(names))
        for step in self.r.phase(phase, (k + 1) * updates):
            if step == k * updates and phase == "energies":
                self.guided.zero_()
                if self.weighers:
                    self.weigh()
            self.r.log(step, step_fn())

    def gradient(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Σ λ ∇E at x (B, D), each in its features: D41. edm.with_energy makes D - σ² Σ λ ∇E of it and the denoiser D.

        That is the denoiser of p e^{-Σ λ E}: the sampler's slope (x - D) / σ gets σ Σ λ ∇E more, so that x, as σ falls,
        goes down the energies. This term is at most 10 √D long in a row: U42.
        """
        total, limit = torch.zeros_like(x), 10 * math.sqrt(x.shape[1])
        level = torch.full((1, 1), sigma, device=x.device)
        for name, scale in self.guides.items():
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                at = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.nets[name](at[:, self.seen[name]], level).sum(), at)
            total[:, self.moved[name]] += scale * slope[:, self.moved[name]]
        length = sigma * total.norm(dim=1, keepdim=True)
        self.guided.add_(torch.stack([torch.ones_like(length).sum(), (length > limit).sum()]))
        return total * (limit / length.clamp(min=limit))


# --- end shared: edis.energies ---


# NEW: the diffusion model and what it generates. Outside the NEW parts this file is iql.py.
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
    n_synthetic = int(args.synthetic_frac * args.batch_size)  # NEW [code of EDIS]
    run.check_batch(args, own=args.batch_size - n_synthetic, generated=n_synthetic)
    if args.online_steps and not args.warmup_steps:
        raise run.UsageError("--warmup-steps", 0, "1 or more: energies need own rows")
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

    # NEW: the model, with no condition, and the energies
    features = Generator.features(args, offline)
    net = TransitionNet(features, args.diffusion_width, args.diffusion_depth, args.diffusion_time_dim)
    generator = Generator(r, args, net, [known, online])
    synthetic = generator.synthetic
    energies = Energies(generator, explore)
    added = generator.state() | energies.state()
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

    # online: one environment step, then utd gradient steps on own experience and generated rows: D47
    def online_step() -> dict[str, torch.Tensor]:
        index = online.draw(args.batch_size - n_synthetic)  # NEW
        batch = mix(online.take(index), synthetic.sample(n_synthetic))
        loss, logs = compiled_losses(nets, batch, args)
        update(nets, opt, loss, args.polyak)
        return logs

    # NEW: the model and the energies learn at these environment steps, first when the warm-up is over: D47
    multiples = range(args.regenerate_every, args.online_steps, args.regenerate_every)
    times = [t for t in (args.warmup_steps, *multiples) if args.warmup_steps <= t < args.online_steps]
    step_fn = r.capture(online_step)
    for k, until in enumerate([*dict.fromkeys(times), args.online_steps]):
        for step in r.phase("online", until):
            if episode := interaction.step(explore):
                r.record(step + 1, episode)
            if step >= args.warmup_steps:
                for _ in range(args.utd):
                    logs = step_fn()
                r.log(step, logs)
            if (step + 1) % args.eval_every == 0 or step + 1 == args.online_steps:
                r.record(step + 1, evaluate(act, r.device))
        if until < args.online_steps:
            energies.regenerate(k)
            if r.once(f"report {k}"):
                r.record(until, judge.guided_rows(energies, k, task, units, offline, online))
    evaluate.export(act, r)
    return r.finish()


if __name__ == "__main__":
    run.main(train, Args, ENV_PRESETS)  # class defaults < ENV_PRESETS < command line
