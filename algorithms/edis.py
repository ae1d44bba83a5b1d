"""EDIS on Cal-QL: a diffusion model of all data, guided by three energies to rows that are like own ones.

Paper    Liu, Liu, Jiang, Chen, Zhang, Chen, Yu, "Energy-Guided Diffusion Sampling for Offline-to-Online Reinforcement
         Learning" (EDIS), ICML 2024, arXiv 2407.12448, code liuxhym/EDIS; the EDM: Karras et al., NeurIPS 2022, arXiv
         2206.00364. Backbone: calql.py, line for line outside the NEW parts.
Idea     A diffusion model learns dataset and own transitions. Energies, each learned as a contrast, pull what it makes
         to the states now visited (E_s), the policy's actions (E_π) and the dynamics (E_T): low E is wanted; the
         sampler follows D - σ² Σ λ ∇E in place of D. Batches are own rows and generated ones.
Symbols  F TransitionNet | D denoiser | σ noise level | N sample_steps | S_churn sample_churn | E TransitionEnergy |
         λ state_energy, policy_energy, dynamics_energy | K negatives per positive
Read     Args; NEW: TransitionEnergy, info_nce, Energies; TransitionNet, Generator; train.
         From calql.py: make_calql_nets (actor, qf, q_target), losses (their sum, of a batch), update (gradient step and
         target), Returns (G of each row). r.phase(name, n): the steps up to n not done yet; r.once(name): true once.
Notes    D1, D2, D3, D4, D5, D6, D7, U1, U2, U3 as in calql.py. Of generated rows, in every file that has them:
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
            -log E[w | x_σ] (Lu et al., arXiv 2304.12824). Code omits σ of σ ∇E: its λ (0.01 to 2) go with that.
         D42 inputs, code: raw rows, step index; here: normalised, times c_in, ln σ / 4; E times c_in, so σ² ∇E is O(1).
         D43 negatives, code: for E_π, E_T all features overwritten, no samples. Here, paper form: the model's rows (a
            joint ratio has the conditional's gradient in its last block); row form, E_s, E_π: real rows, as a weight
            can tell these apart without telling what is generated.
         D44 groups, code: half of another state, of E_s one softmax over 256 + 2,560; here: 1 positive, 10 negatives.
         D45 learner: calql.py's with its presets, 1M offline steps, no entropy in the target: only EDIS differs.
            Code: 300,000 steps, entropy, α per dataset; locomotion: Lagrange gap 10, two critic layers, rewards
            normalised, no clip; AntMaze: r - 1, states normalised; Adroit: Lagrange; 10 episodes everywhere.
         D46 first regeneration after the warm-up, no update before; the code's comes with one own transition.
         D47 batches: generated and own rows, none of the dataset [code].
         U40 1,000 updates of each energy per regeneration (code: 20 cannot fit); nets and Adam persist [code].
         U41 positives: of E_π the policy's actions at the negatives' states; real rows are of both buffers.
         U42 the clip at 10 √D [code] is on the term added to the slope, σ Σ λ ∇E, all energies together.
         U44 generated rows have no return: calibration, where it is on, does not bound them.
         U45 share of tasks that the code has no file for (Maze2D, Adroit-cloned, shifted): 0.2; embedded: 0.5.
Metrics  those of calql.py; loss/diffusion (< 1); loss/{state,policy,dynamics,tilt}_energy (chance 2.40); of each
         regeneration energy/effective, (Σ w)² / Σ w² as a share of real rows (small: few stand for all), energy/clipped
         (about 0) and, unguided and guided, *_js_states, *_policy_gap, *_sim_error, syn/*: common/judge.py.
         synthetic-<k>.npz has 2,000 rows of each kind.
Run      python algorithms/edis.py --env hopper-medium-v2 --seed 0
         without an energy --state-energy 0 | --policy-energy 0 | --dynamics-energy 0 | as described --energy-form paper
         EDIS as DARE ran it --diffusion-steps 50000 | four times cheaper sampling --sample-steps 32 --sample-churn 0
         the common start: --from-offline runs/calql/hopper-medium-v2/seed0
Cost     reacher-mini-v0 from an offline phase: 2.4 CPU minutes; published sizes want a GPU (not measured there).
Fails    to do much beside taking the dataset from its learner: on reacher-mini-v0 Cal-QL loses as much by that
         alone (README: controls). Guidance moves s' away from the simulator's, on hopper-mini-v0 from 0.082 standard
         deviations to 0.122; the tilt alone to 0.125, E_T alone to 0.087 (sampled anew from runs 0 to 4); 5,000 more
         updates leave 0.115 of 0.117 (two seeds): learned gradients err by more than the model, which E_T should mend.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data, edm, judge, run
from common.buffer import Batch, ReplayBuffer, mix, union_rows
from common.run import Count, Fraction, Natural, Number, Positive, Rate, Several, Share, Weight


@dataclass(frozen=True)
class Args:
    env: str = "hopper-medium-v2"  # task; every default below is the papers' value for locomotion
    dataset: Path | None = None  # HDF5 file in D4RL layout instead of the task's own
    seed: Natural = 0  # networks, batches, exploration and evaluation all derive from it
    offline_steps: Natural = 1_000_000  # gradient steps [DARE §7.1]: D45
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
    cql_weight_online: Weight = 10.0  # α_cql online [DARE Table 4]: D45
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
    # NEW: synthetic rows
    terminal_flag: Literal["classifier", "joint"] = "classifier"  # from s', or as a feature of the rows: D21
    synthetic_frac: Fraction = 0.2  # share of a batch that is generated [code of EDIS]: D47, U45
    regenerate_every: Count = 10_000  # environment steps [code of EDIS]
    synthetic_rows: Count = 100_000  # rows per regeneration [code of EDIS]
    # NEW: diffusion model
    diffusion_steps: Count = 10_000  # gradient steps per regeneration [code of EDIS]
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
    "antmaze-": dict(  # [DARE Table 4; episodes: CORL]
        critic_layers=5, cql_weight=5.0, cql_weight_online=5.0, lagrange=True, max_target_backup=True,
        normalize_obs=False, reward_scale=10.0, reward_bias=-5.0, sparse_reward=True, target_gap=0.8,
        eval_every=10_000, eval_episodes=100,
        synthetic_frac=0.5,  # [code of EDIS]
    ),
    **{k: dict(cql_weight=1.0, cql_weight_online=1.0, max_target_backup=True, normalize_obs=False)
       for k in ("pen-", "door-", "hammer-", "relocate-")},  # [CORL, fine-tuning]
    "maze2d-": dict(policy_lr=3e-5, lagrange=True, target_gap=5.0, eval_episodes=100),  # [CORL, offline CQL]
    # shares of the code of EDIS; 0.2 in its other files
    "antmaze-medium-": dict(synthetic_frac=0.3),
    "pen-human": dict(synthetic_frac=0.3),
    "walker2d-random-v2": dict(synthetic_frac=0.1),
    **{k: dict(synthetic_frac=0.5)
       for k in ("door-human", "halfcheetah-medium-expert-v2", "hopper-medium-replay-v2", "hopper-medium-expert-v2")},
    **{k: dict(  # sizes for minutes on one core: U1
        online_steps=6_000, warmup_steps=2_000, eval_every=1_000, hidden=64, batch_size=128,
        policy_lr=3e-4, critic_lr=1e-3, polyak=0.02, cql_n_actions=4, cql_weight=5.0, cql_weight_online=5.0,
        regenerate_every=2_000, synthetic_rows=10_000, diffusion_steps=4_000, diffusion_width=256, diffusion_depth=3,
        diffusion_time_dim=64, diffusion_lr=1e-3, sample_steps=32, sample_churn=0.0, sample_batch=5_000,
        energy_width=64, energy_pool=5_000, synthetic_frac=0.5,
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
    "state_energy + policy_energy + dynamics_energy > 0": (
        "energy_form", "energy_updates", "energy_groups", "energy_lr", "energy_width", "energy_pool",
    ),
}  # fmt: skip


# NEW: the energies. From here to calql.py's blocks, the method.
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


# NEW: the diffusion model and what it generates. Outside the NEW parts this file is calql.py.
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


# From here to `train`: networks, losses, Monte-Carlo returns, optimizer of calql.py, as they are there.
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
    n_synthetic = int(args.synthetic_frac * args.batch_size)  # NEW [code of EDIS]
    run.check_batch(args, own=args.batch_size - n_synthetic, generated=n_synthetic)
    if args.online_steps and not args.warmup_steps:
        raise run.UsageError("--warmup-steps", 0, "1 or more: energies need own rows")
    dataset = data.load(args.env, args.dataset)
    r.require(dataset=dataset.sha256)
    moments = dataset.moments() if args.normalize_obs else None
    units = data.Units(args.reward_scale, args.reward_bias, moments)
    offline = dataset.buffer(units, r.device)
    online = offline.like(args.online_steps)
    returns = Returns(args, dataset, units, online)
    known = offline.subset(dataset.known)  # NEW: rows whose s' is known: D24
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

    # NEW: the model, with no condition, and the energies
    features = Generator.features(args, offline)
    net = TransitionNet(features, args.diffusion_width, args.diffusion_depth, args.diffusion_time_dim)
    generator = Generator(r, args, net, [known, online])
    synthetic = generator.synthetic
    energies = Energies(generator, explore)
    added = generator.state() | energies.state()
    r.register(nets=nets, opt=opt, online=online, interaction=interaction, **returns.state(), **added)
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

    # online: one environment step, then utd gradient steps on own experience and generated rows: D47
    def online_step() -> dict[str, torch.Tensor]:
        n_online = args.batch_size - n_synthetic  # NEW
        index = online.draw(n_online, returns.drawable)
        batch = mix(online.take(index), synthetic.sample(n_synthetic))
        noise = draw_noise(args.batch_size, task.act_dim, args.cql_n_actions, r.device)
        bound = None  # D3
        if args.calibrate_online:
            unbound = torch.full((n_synthetic,), -torch.inf, device=r.device)  # NEW: no return: U44
            bound = torch.cat([returns.own[index], unbound])
        loss, logs = compiled_losses(nets, batch, bound, args.cql_weight_online, noise, args)
        update(nets, opt, loss, args.polyak)
        return logs

    # NEW: the model and the energies learn at these environment steps, first when the warm-up is over: D46
    multiples = range(args.regenerate_every, args.online_steps, args.regenerate_every)
    times = [t for t in (args.warmup_steps, *multiples) if args.warmup_steps <= t < args.online_steps]
    step_fn = r.capture(online_step)
    for k, until in enumerate([*dict.fromkeys(times), args.online_steps]):
        for step in r.phase("online", until):
            if episode := interaction.step(explore):
                r.record(step + 1, episode)
                returns.add_episode(episode["train/episode_length"])
            if step >= args.warmup_steps and (interaction.episode or not args.calibrate_online):
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
