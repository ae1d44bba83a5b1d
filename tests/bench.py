"""Speed at published sizes: ours beside the loops that most repositories have, and what whole runs will take.

    python tests/bench.py                              the table: gradient steps, samples and references per second
    python tests/bench.py --only IQL EDM --rounds 3    only what has one of these words in its name
    python tests/bench.py --csv tests/bench.csv --readme README.md   keep it too, and put it between README's markers
    python tests/bench.py --from-csv --csv tests/bench.csv --readme README.md   measure nothing: what was kept
    python tests/bench.py --files [iql dual ...]       files (without names: all) through their own `train`, a few steps
                                                       of each phase: rates, memory, hours of a full run, of run_all.sh

The table is one run in interleaved rounds: rates are medians over rounds, on this machine; ratios are medians of the
rounds' ratios and mean something even on a busy one. `plain` is a file's step as it is, `compiled` what --compile makes
of it on a CPU, `captured` either as a CUDA graph (`compiled, captured`: a file's default on a GPU). Ours multiply as
`Run` has them do, on a GPU with bf16 where the file has it; textbooks in float32 throughout.

The textbooks follow public repositories, with the same networks, batches, numbers of evaluations and arithmetic:
  IQL      one module per network, an optimizer each, host-side numpy indices, fields gathered one by one, target update
           parameter by parameter, `.item()` of every loss at every step.
  PEX      the same, online: each policy's action has its Q from the twins, one call after the other [PEX].
  Cal-QL   the same; critics one after the other, the ten actions of a kind together [CORL].
  WSRL     the same, for one environment step: four steps of the critics, one of the actor; a module per critic, of the
           targets the two drawn on the host alone, critics frozen in the actor's loss [REDQ].
  APL      as Cal-QL, five critics and an optimizer each; a batch of recent rows, every other one, has no pessimism to
           compute, in either [APL0].
  SO2      the same, for one environment step: ten steps of the critics and of the density ratio, one of the actor; a
           module per critic and target; priorities in a sum tree on the host, searched row by row [SO2, OFF2ON].
  Diff-QL  the same; modules for the critics; the schedule's numbers looked up per row at each step of the chain, an
           optimizer each for denoiser and critics, the average parameter by parameter [DIFFQL].
  Diffuser a step of the planner and one of the guide: windows gathered and normalised on the host, the schedule looked
           up per row, averages parameter by parameter every 10th step [DIFFUSER].
  EDM      training: batches put together on the host, `.item()` of the loss, clipping, a schedule object, EMA parameter
           by parameter every 10th step. Sampling: three noise levels read back per step, noise drawn also where the
           churn is 0, a vector of sigmas filled for each evaluation [SynthER].
  CEP      behavior: batches put together on the host (CEP's own loader fetches row by row, far slower). References:
           DPM-Solver on vectors of times, so that schedule and time embedding are computed for every row at every
           evaluation, by networks that require gradients; like CEP's, it reads nothing back.
"""

import contextlib
import csv
import importlib
import io
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from algorithms import apl, calql, diffql, diffuser, iql, iql_dare, pex, so2, synther, wsrl
from common import data, edm, run
from common.buffer import Batch, ReplayBuffer, mix
from common.run import CapturedStep, UsageError, pick_device
from common.tools import report

ROOT = Path(__file__).parent.parent
FILES = sorted(p.stem for p in (ROOT / "algorithms").glob("*.py"))
TASK = "hopper-medium-v2"  # whose published settings are measured, and whose sizes:
OBS, ACT, ROWS = 11, 3, 200_000
CHUNK = {"cpu": 64, "cuda": 10_000}  # rows generated at once; a CPU's rate is the same from 64 rows on
MARKERS = "<!-- speed -->", "<!-- end speed -->"
COLUMNS = ["what", "variant", "per_second", "ratio_to_textbook", "peak_mib"]
COLUMNS += ["device", "threads", "torch", "python"]
Row = dict[str, str]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """What a program that times things in rounds and keeps a table is asked."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1  # on a CPU
    rounds: int = 5
    seconds: float = 1.0  # of each thing in a round; one call if that takes longer
    csv: Path | None = None  # keep the table here
    from_csv: bool = False  # measure nothing, read --csv
    readme: Path | None = None  # put the table between this file's markers


@dataclass(frozen=True)
class Args(Timing):
    """Speed of ours beside textbook loops; with --files, of whole files. What is not measured again stays in --csv."""

    only: tuple[str, ...] = ()  # measure what has one of these words in its name
    files: tuple[str, ...] | None = None  # instead of the table: these files, without a name all
    steps: int | None = None  # of each phase of a file; default: 200 on a GPU, 20 without


# ---- the textbooks ----


def relu_mlp(inputs: int, layers: int, outputs: int, device: torch.device) -> nn.Sequential:
    sizes = [inputs] + [256] * layers
    hidden = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(256, outputs)).to(device)


def learn(opt: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    opt.step()


def follow(target: nn.Module, q: nn.Module) -> None:
    for tp, p in zip(target.parameters(), q.parameters(), strict=True):
        tp.data.copy_(0.995 * tp.data + 0.005 * p.data)


def iql_textbook(table: Batch, device: torch.device, expanded: bool = False) -> Step:
    """One gradient step of IQL; `expanded`, of PEX online."""
    q1, q2 = (relu_mlp(OBS + ACT, 2, 1, device) for _ in range(2))
    v, mean = relu_mlp(OBS, 2, 1, device), relu_mlp(OBS, 2, ACT, device)
    log_std = nn.Parameter(torch.zeros(ACT, device=device))
    target1, target2, offline_mean = deepcopy(q1), deepcopy(q2), deepcopy(mean)
    v_opt = torch.optim.Adam(v.parameters(), lr=3e-4)
    q_opt = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=3e-4)
    pi_opt = torch.optim.Adam([*mean.parameters(), log_std], lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(pi_opt, 1_000_000)
    log = {}

    def compose(s: torch.Tensor, policy: torch.distributions.Normal) -> torch.Tensor:
        actions = [torch.tanh(offline_mean(s)), policy.sample().clamp(-1, 1)]
        pairs = [torch.cat([s, a], 1) for a in actions]
        values = torch.cat([torch.min(q1(sa), q2(sa)) for sa in pairs], 1)
        chosen = torch.distributions.Categorical(logits=10.0 * values).sample()
        return torch.stack(actions)[chosen, torch.arange(len(s), device=device)]

    def step() -> None:
        rows = torch.as_tensor(np.random.randint(0, ROWS, size=256), device=device)
        s, a, r, s2, d = (x[rows] for x in table)
        sa = torch.cat([s, a], 1)
        with torch.no_grad():
            target_q = torch.min(target1(sa), target2(sa)).squeeze(1)
            next_v = v(s2).squeeze(1)
        adv = target_q - v(s).squeeze(1)
        v_loss = torch.mean(torch.abs(0.7 - (adv < 0).float()) * adv**2)
        log["v"] = v_loss.item()
        learn(v_opt, v_loss)
        y = r + (1 - d) * 0.99 * next_v
        q_loss = sum(F.mse_loss(q(sa).squeeze(1), y) for q in (q1, q2)) / 2
        log["q"] = q_loss.item()
        learn(q_opt, q_loss)
        follow(target1, q1)
        follow(target2, q2)
        policy = torch.distributions.Normal(torch.tanh(mean(s)), log_std.clamp(-5, 2).exp())
        if expanded:
            with torch.no_grad():
                a = compose(s, policy)
                sa = torch.cat([s, a], 1)
                adv = (torch.min(target1(sa), target2(sa)) - v(s)).squeeze(1)
        weight = torch.exp(3.0 * adv.detach()).clamp(max=100.0)
        pi_loss = torch.mean(-weight * policy.log_prob(a).sum(-1))
        log["pi"] = pi_loss.item()
        learn(pi_opt, pi_loss)
        if not expanded:
            schedule.step()

    return step


def calql_textbook(table: Batch, device: torch.device) -> Step:
    """One gradient step of Cal-QL."""
    q1, q2 = (relu_mlp(OBS + ACT, 3, 1, device) for _ in range(2))
    pi, (target1, target2) = relu_mlp(OBS, 3, 2 * ACT, device), (deepcopy(q1), deepcopy(q2))
    log_alpha = torch.zeros(1, device=device, requires_grad=True)
    q_opt = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=3e-4)
    pi_opt, alpha_opt = torch.optim.Adam(pi.parameters(), lr=1e-4), torch.optim.Adam([log_alpha], lr=1e-4)
    returns, log = torch.randn(ROWS, device=device), {}

    def sample(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = pi(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        squash = torch.distributions.transforms.TanhTransform(cache_size=1)
        policy = torch.distributions.TransformedDistribution(normal, squash)
        action = policy.rsample()
        return action, policy.log_prob(action).sum(-1)

    def step() -> None:
        index = torch.as_tensor(np.random.randint(0, ROWS, size=256), device=device)
        s, a, r, s2, d = (x[index] for x in table)
        g = returns[index]
        new, log_pi = sample(s)
        alpha_loss = -(log_alpha * (log_pi.detach() - ACT)).mean()
        sn = torch.cat([s, new], 1)
        pi_loss = (log_alpha.exp().detach() * log_pi - torch.min(q1(sn), q2(sn)).squeeze(1)).mean()
        with torch.no_grad():
            s2a2 = torch.cat([s2, sample(s2)[0]], 1)
            y = r + 0.99 * (1 - d) * torch.min(target1(s2a2), target2(s2a2)).squeeze(1)
        now, later = (x[:, None].repeat(1, 10, 1).view(-1, OBS) for x in (s, s2))
        terms = {q1: [], q2: []}
        for where in (None, now, later):
            if where is None:
                action = torch.rand(2_560, ACT, device=device) * 2 - 1
                log_prob = torch.full((2_560,), -ACT * math.log(2), device=device)
            else:
                with torch.no_grad():
                    action, log_prob = sample(where)
            for q in (q1, q2):
                value = q(torch.cat([now, action], 1)).view(256, 10)
                value = value if where is None else torch.maximum(value, g[:, None])
                terms[q].append(value - log_prob.view(256, 10))
        q_loss = 0.0
        for q in (q1, q2):
            q_data = q(torch.cat([s, a], 1)).squeeze(1)
            gap = torch.logsumexp(torch.cat(terms[q], 1), 1) - q_data
            q_loss = q_loss + F.mse_loss(q_data, y) + 10.0 * gap.clamp(min=-200).mean()
        log.update(alpha=alpha_loss.item(), pi=pi_loss.item(), q=q_loss.item())
        for opt, loss in ((alpha_opt, alpha_loss), (pi_opt, pi_loss), (q_opt, q_loss)):
            opt.zero_grad()
            loss.backward(retain_graph=True)
        for opt in (alpha_opt, pi_opt, q_opt):
            opt.step()
        follow(target1, q1)
        follow(target2, q2)

    return step


def wsrl_textbook(table: Batch, device: torch.device) -> Step:
    """The update of WSRL for one environment step: 4 x 256 rows for ten critics, then 1,024 for the actor."""

    def net(inputs: int, outputs: int) -> nn.Sequential:
        first, second = (
            nn.Sequential(nn.Linear(i, 256), nn.LayerNorm(256), nn.ReLU()) for i in (inputs, 256)
        )
        return nn.Sequential(first, second, nn.Linear(256, outputs)).to(device)

    critics, pi = nn.ModuleList(net(OBS + ACT, 1) for _ in range(10)), net(OBS, 2 * ACT)
    targets, raw_alpha = deepcopy(critics), torch.zeros(1, device=device, requires_grad=True)
    q_opt = torch.optim.Adam(critics.parameters(), lr=3e-4)
    pi_opt, alpha_opt = torch.optim.Adam(pi.parameters(), lr=1e-4), torch.optim.Adam([raw_alpha], lr=1e-4)
    log = {}

    def sample(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = pi(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.exp().clamp(1e-5, 10))
        squash = torch.distributions.transforms.TanhTransform(cache_size=1)
        policy = torch.distributions.TransformedDistribution(normal, squash)
        action = policy.rsample()
        return action, policy.log_prob(action).sum(-1)

    def step() -> None:
        index = torch.as_tensor(np.random.randint(0, ROWS, size=1_024), device=device)
        batch = [x[index] for x in table]
        for s, a, r, s2, d in zip(*(x.split(256) for x in batch), strict=True):
            with torch.no_grad():
                s2a2 = torch.cat([s2, sample(s2)[0]], 1)
                drawn = [targets[k](s2a2) for k in np.random.randint(0, 10, size=2)]
                y = r + 0.99 * (1 - d) * torch.cat(drawn, 1).min(1).values
            sa = torch.cat([s, a], 1)
            q_loss = sum(F.mse_loss(q(sa).squeeze(1), y) for q in critics) / 10
            log["q"] = q_loss.item()
            learn(q_opt, q_loss)
            for target, q in zip(targets, critics, strict=True):
                follow(target, q)
        new, log_pi = sample(batch[0])
        critics.requires_grad_(False)
        least = torch.cat([q(torch.cat([batch[0], new], 1)) for q in critics], 1).min(1).values
        critics.requires_grad_(True)
        alpha = F.softplus(raw_alpha)
        pi_loss, alpha_loss = (
            (alpha.detach() * log_pi - least).mean(),
            -(alpha * (log_pi.detach() - ACT)).mean(),
        )
        log.update(pi=pi_loss.item(), alpha=alpha_loss.item())
        learn(pi_opt, pi_loss)
        learn(alpha_opt, alpha_loss)

    return step


def apl_textbook(table: Batch, device: torch.device) -> Step:
    """One gradient step of APL online: every other one on recent rows, by TD alone."""
    critics = [relu_mlp(OBS + ACT, 3, 1, device) for _ in range(5)]
    pi, targets = relu_mlp(OBS, 3, 2 * ACT, device), deepcopy(critics)
    log_alpha = torch.zeros(1, device=device, requires_grad=True)
    q_opts = [torch.optim.Adam(q.parameters(), lr=3e-4) for q in critics]
    pi_opt, alpha_opt = torch.optim.Adam(pi.parameters(), lr=1e-4), torch.optim.Adam([log_alpha], lr=1e-4)
    log, steps = {}, count()

    def sample(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = pi(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        u = normal.rsample()
        action = torch.tanh(u)
        return action, (normal.log_prob(u) - torch.log(1 - action**2 + 1e-6)).sum(-1)

    def step() -> None:
        recent = next(steps) % 2 == 1
        first = ROWS - 20_000 if recent else 0
        index = torch.as_tensor(np.random.randint(first, ROWS, size=256), device=device)
        s, a, r, s2, d = (x[index] for x in table)
        new, log_pi = sample(s)
        alpha_loss = -(log_alpha * (log_pi.detach() - ACT)).mean()
        log["alpha"] = alpha_loss.item()
        learn(alpha_opt, alpha_loss)
        sn = torch.cat([s, new], 1)
        values = torch.stack([q(sn).squeeze(1) for q in critics])
        pi_loss = (log_alpha.exp().detach() * log_pi - values.mean(0)).mean()
        pi_opt.zero_grad()
        pi_loss.backward()
        with torch.no_grad():
            s2a2 = torch.cat([s2, sample(s2)[0]], 1)
            pair = np.random.choice(5, 2, replace=False)
            y = r + 0.99 * (1 - d) * torch.min(*(targets[k](s2a2) for k in pair)).squeeze(1)
            now, later = (x[:, None].repeat(1, 10, 1).view(-1, OBS) for x in (s, s2))
            uniform = torch.rand(2_560, ACT, device=device) * 2 - 1
            drawn = [(uniform, torch.full((2_560,), -ACT * math.log(2), device=device))]
            drawn += [] if recent else [sample(now), sample(later)]
        losses = []
        for q in critics:
            q_data = q(torch.cat([s, a], 1)).squeeze(1)
            losses.append(F.mse_loss(q_data, y))
            if not recent:
                terms = [(q(torch.cat([now, b], 1)).squeeze(1) - p).view(256, 10) for b, p in drawn]
                losses[-1] = losses[-1] + 5.0 * (torch.logsumexp(torch.cat(terms, 1), 1) - q_data).mean()
        for opt, loss in zip(q_opts, losses, strict=True):
            learn(opt, loss)
        pi_opt.step()
        log.update(pi=pi_loss.item(), q=[x.item() for x in losses])
        for target, q in zip(targets, critics, strict=True):
            follow(target, q)

    return step


class SumTree:
    """Rows in proportion to their priority: a binary tree of sums, walked row by row."""

    def __init__(self, rows: int):
        self.leaves = 1 << (rows - 1).bit_length()
        self.sums = np.zeros(2 * self.leaves)
        self.sums[self.leaves : self.leaves + rows] = 1.0
        for node in range(self.leaves - 1, 0, -1):
            self.sums[node] = self.sums[2 * node] + self.sums[2 * node + 1]

    def draw(self, n: int) -> np.ndarray:
        drawn = np.zeros(n, dtype=np.int64)
        for i, point in enumerate((np.arange(n) + np.random.rand(n)) / n * self.sums[1]):
            node = 1
            while node < self.leaves:
                node *= 2
                if point > self.sums[node]:
                    point -= self.sums[node]
                    node += 1
            drawn[i] = node - self.leaves
        return drawn

    def assign(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        for row, priority in zip(rows, priorities, strict=True):
            node = row + self.leaves
            change = priority - self.sums[node]
            while node:
                self.sums[node] += change
                node //= 2


def so2_textbook(table: Batch, device: torch.device) -> Step:
    """The update of SO2 on balanced replay for one environment step: ten steps of ten critics, one of the actor."""
    critics = nn.ModuleList(relu_mlp(OBS + ACT, 3, 1, device) for _ in range(10))
    pi = relu_mlp(OBS, 3, 2 * ACT, device)
    targets, ratio, tree = deepcopy(critics), relu_mlp(OBS + ACT, 2, 1, device), SumTree(ROWS)
    q_opt = torch.optim.Adam(critics.parameters(), lr=1e-3)
    pi_opt = torch.optim.Adam(pi.parameters(), lr=1e-3)
    ratio_opt = torch.optim.Adam(ratio.parameters(), lr=3e-4)
    log, own = {}, ROWS - 20_000  # own rows come last

    def sample(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = pi(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = normal.rsample()
        action = torch.tanh(u)
        return action, (normal.log_prob(u) - torch.log(1 - action**2 + 1e-6)).sum(-1)

    def at(index: np.ndarray) -> list[torch.Tensor]:
        index = torch.as_tensor(index, device=device)
        return [x[index] for x in table]

    def step() -> None:
        for _ in range(10):
            index = tree.draw(256)
            s, a, r, s2, d = at(index)
            mine, theirs = at(np.random.randint(own, ROWS, size=256)), at(np.random.randint(0, own, size=256))
            w_own, w_off = (ratio(torch.cat(x[:2], 1)).exp() for x in (mine, theirs))
            ratio_loss = -torch.log(2 * w_own / (w_own + 1)).mean() - torch.log(2 / (w_off + 1)).mean()
            learn(ratio_opt, ratio_loss)
            log["ratio"] = ratio_loss.item()
            sa = torch.cat([s, a], 1)
            with torch.no_grad():
                priorities = (ratio(sa).exp() ** 0.2 / (w_off**0.2).mean()).clamp(1e-3, 1e3).squeeze(1)
                a2, log_pi = sample(s2)
                a2 = (a2 + (0.3 * torch.randn_like(a2)).clamp(-0.6, 0.6)).clamp(-1, 1)
                s2a2 = torch.cat([s2, a2], 1)
                y = [r + 0.99 * (1 - d) * (q(s2a2).squeeze(1) - 0.2 * log_pi) for q in targets]
            tree.assign(index, priorities.cpu().numpy())
            q_loss = sum(F.mse_loss(q(sa).squeeze(1), of) for q, of in zip(critics, y, strict=True))
            log["q"] = q_loss.item()
            learn(q_opt, q_loss)
            for target, q in zip(targets, critics, strict=True):
                follow(target, q)
        new, log_pi = sample(s)
        critics.requires_grad_(False)
        least = torch.cat([q(torch.cat([s, new], 1)) for q in critics], 1).min(1).values
        critics.requires_grad_(True)
        pi_loss = (0.2 * log_pi - least).mean()
        log["pi"] = pi_loss.item()
        learn(pi_opt, pi_loss)

    return step


def diffql_textbook(table: Batch, device: torch.device) -> Step:
    """One gradient step of Diffusion-QL."""

    def mish_mlp(*sizes: int) -> nn.Sequential:
        layers = [m for i, o in pairwise(sizes[:-1]) for m in (nn.Linear(i, o), nn.Mish())]
        return nn.Sequential(*layers, nn.Linear(*sizes[-2:])).to(device)

    actor = nn.ModuleDict(dict(net=mish_mlp(ACT + 16 + OBS, 256, 256, 256, ACT), time=mish_mlp(16, 32, 16)))
    q1, q2 = (mish_mlp(OBS + ACT, 256, 256, 256, 1) for _ in range(2))
    average, target1, target2 = deepcopy(actor), deepcopy(q1), deepcopy(q2)
    pi_opt = torch.optim.Adam(actor.parameters(), lr=3e-4)
    q_opt = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=3e-4)
    log, steps = {}, count()
    alphas = torch.tensor(diffql.vp_alphas(5), device=device)
    left = alphas.cumprod(0)
    before = F.pad(left[:-1], (1, 0), value=1.0)
    schedule = dict(
        signal=left.sqrt(), noise=(1 - left).sqrt(), clean=before.sqrt() * (1 - alphas) / (1 - left),
        here=alphas.sqrt() * (1 - before) / (1 - left), std=((1 - alphas) * (1 - before) / (1 - left)).sqrt(),
    )  # fmt: skip

    def look_up(name: str, t: torch.Tensor) -> torch.Tensor:
        return schedule[name].gather(0, t)[:, None]

    def predict(nets: nn.ModuleDict, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(torch.arange(8, device=device) * -(math.log(10_000) / 7))
        angles = t[:, None] * frequencies[None]
        return nets["net"](torch.cat([x, nets["time"](torch.cat([angles.sin(), angles.cos()], 1)), s], 1))

    def sample(nets: nn.ModuleDict, s: torch.Tensor) -> torch.Tensor:
        x = torch.randn(len(s), ACT, device=device)
        for i in reversed(range(5)):
            t = torch.full((len(s),), i, device=device, dtype=torch.long)
            clean = (x - look_up("noise", t) * predict(nets, x, t, s)) / look_up("signal", t)
            mean = look_up("clean", t) * clean.clamp(-1, 1) + look_up("here", t) * x
            x = mean + (t != 0).float()[:, None] * look_up("std", t) * torch.randn_like(x)
        return x

    def step() -> None:
        index = torch.as_tensor(np.random.randint(0, ROWS, size=256), device=device)
        s, a, r, s2, d = (x[index] for x in table)
        sa = torch.cat([s, a], 1)
        with torch.no_grad():
            s2a2 = torch.cat([s2, sample(average, s2)], 1)
            y = r + 0.99 * (1 - d) * torch.min(target1(s2a2), target2(s2a2)).squeeze(1)
        q_loss = F.mse_loss(q1(sa).squeeze(1), y) + F.mse_loss(q2(sa).squeeze(1), y)
        q_opt.zero_grad()
        q_loss.backward()
        nn.utils.clip_grad_norm_([*q1.parameters(), *q2.parameters()], 9.0)
        q_opt.step()
        t, eps = torch.randint(5, (256,), device=device), torch.randn_like(a)
        cloning = F.mse_loss(predict(actor, look_up("signal", t) * a + look_up("noise", t) * eps, t, s), eps)
        both = [q(torch.cat([s, sample(actor, s)], 1)) for q in (q1, q2)]
        first, second = both if np.random.rand() > 0.5 else both[::-1]
        pi_loss = cloning - first.mean() / second.abs().mean().detach()
        pi_opt.zero_grad()
        pi_loss.backward()
        nn.utils.clip_grad_norm_(actor.parameters(), 9.0)
        pi_opt.step()
        log.update(q=q_loss.item(), cloning=cloning.item(), pi=pi_loss.item())
        if next(steps) % 5 == 0:
            for mine, live in zip(average.parameters(), actor.parameters(), strict=True):
                mine.data = 0.995 * mine.data + 0.005 * live.data
        follow(target1, q1)
        follow(target2, q2)

    return step


def diffuser_textbook(table: Batch, device: torch.device) -> Step:
    """One gradient step of Diffuser's planner and one of its guide, of the same networks."""
    zero, one, horizon = torch.zeros(OBS), torch.ones(OBS), 4
    planner, trunk = (diffuser.PlannerNet(horizon, ACT, zero, one, 512, 3) for _ in range(2))
    guide = diffuser.ReturnGuide(trunk, torch.zeros(()), torch.ones(())).to(device)
    nets = [planner.to(device), guide]
    averages, opts = deepcopy(nets), [torch.optim.Adam(net.parameters(), lr=2e-4) for net in nets]
    host = [x.cpu().numpy() for x in (table.actions, table.obs, table.rewards)]
    mean, std = host[1].mean(0), host[1].std(0)
    weight = torch.ones(horizon, ACT + OBS, device=device)
    weight[0, :ACT], weight[0, ACT:] = 10.0, 0.0
    steps, log = count(), {}
    angles = 0.5 * math.pi * torch.arange(1, 21, device=device) / 20
    schedule = dict(signal=angles.cos(), noise=angles.sin())

    def look_up(name: str, t: torch.Tensor) -> torch.Tensor:
        return schedule[name].gather(0, t)[:, None, None]

    def windows() -> tuple[torch.Tensor, ...]:
        start = np.random.randint(0, ROWS - horizon, size=256)
        rows = start[:, None] + np.arange(horizon)
        x = np.concatenate([host[0][rows], (host[1][rows] - mean) / std], 2)
        x, t = torch.as_tensor(x, device=device), torch.randint(20, (256,), device=device)
        eps = torch.randn_like(x)
        z = look_up("signal", t) * x + look_up("noise", t) * eps
        z[:, 0, ACT:] = x[:, 0, ACT:].clone()
        return z, eps, (t + 1) / 20, torch.as_tensor(host[2][start], device=device)

    def step() -> None:
        z, eps, u, _ = windows()
        losses = [((planner(z, u, torch.zeros_like(u)) - eps).square() * weight).mean()]
        z, _, u, returns = windows()
        losses += [F.mse_loss(guide(z, u), returns)]
        for loss, opt in zip(losses, opts, strict=True):
            learn(opt, loss)
        log.update(planner=losses[0].item(), guide=losses[1].item())
        if next(steps) % 10 == 0:
            for average, net in zip(averages, nets, strict=True):
                for mine, live in zip(average.parameters(), net.parameters(), strict=True):
                    mine.data = 0.995 * mine.data + 0.005 * live.data

    return step


def transition_net(device: torch.device) -> nn.Module:
    """The textbooks' EDM network: ours, for the same arithmetic."""
    a, features = synther.Args(), 2 * OBS + ACT + 2
    net = synther.TransitionNet(features, a.diffusion_width, a.diffusion_depth, a.diffusion_time_dim)
    return net.to(device)


def precondition(net: nn.Module, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """D(x; σ), σ (B,), by its four coefficients.  [EDM Table 1]"""
    s = sigma.view(-1, 1)
    c_skip, c_out, c_in = 1 / (s**2 + 1), s * (s**2 + 1) ** -0.5, (s**2 + 1) ** -0.5
    return c_skip * x + c_out * net(c_in * x, torch.log(sigma) * 0.25)


def edm_textbook(table: Batch, device: torch.device) -> Step:
    """One gradient step of the EDM of transitions."""
    net, fields, log = transition_net(device), [x.cpu().numpy() for x in table], {"steps": 0}
    average, opt = deepcopy(net), torch.optim.Adam(net.parameters(), lr=3e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50_000)
    mean, std = torch.zeros(2 * OBS + ACT + 2, device=device), torch.ones(2 * OBS + ACT + 2, device=device)

    def step() -> None:
        index = np.random.randint(0, ROWS, size=256)
        s, a, r, s2, d = (x[index] for x in fields)
        rows = torch.from_numpy(np.concatenate([s, a, r[:, None], s2, d[:, None]], 1)).to(device)
        x = (rows - mean) / std
        sigma = (torch.randn(256, device=device) * 1.2 - 1.2).exp()
        noised = x + sigma.view(-1, 1) * torch.randn_like(x)
        errors = F.mse_loss(precondition(net, noised, sigma), x, reduction="none").mean(1)
        loss = (errors * (sigma**2 + 1) / sigma**2).mean()
        log["loss"] = loss.item()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
        log["steps"] += 1
        if log["steps"] % 10 == 0:
            for mine, p in zip(average.parameters(), net.parameters(), strict=True):
                mine.data.lerp_(p.data, 0.005)

    return step


def sampling_textbook(device: torch.device, rows: int) -> Step:
    """`rows` samples of the EDM: 128 levels, churn 80."""
    net, width, n = transition_net(device), 2 * OBS + ACT + 2, synther.Args.sample_steps
    mean, std = torch.zeros(width, device=device), torch.ones(width, device=device)

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return (x - precondition(net, x, torch.full((rows,), sigma, device=device))) / sigma

    @torch.no_grad()
    def sample() -> torch.Tensor:
        low, high = edm.SIGMA_MIN ** (1 / 7), edm.SIGMA_MAX ** (1 / 7)
        sigmas = (high + torch.arange(n, device=device) / (n - 1) * (low - high)) ** 7
        sigmas = torch.cat([sigmas, torch.zeros(1, device=device)])
        churned = (sigmas >= edm.CHURN_MIN) & (sigmas <= edm.CHURN_MAX)
        gammas = torch.where(churned, min(synther.Args.sample_churn / n, math.sqrt(2) - 1), 0.0)
        x = sigmas[0] * torch.randn(rows, width, device=device)
        for level in zip(sigmas[:-1], sigmas[1:], gammas[:-1], strict=True):
            sigma, after, gamma = (v.item() for v in level)
            hat = sigma * (1 + gamma)
            x = x + math.sqrt(hat**2 - sigma**2) * edm.CHURN_NOISE * torch.randn(rows, width, device=device)
            first = slope(x, hat)
            end = x + (after - hat) * first
            x = x + 0.5 * (after - hat) * (first + slope(end, after)) if after != 0 else end
        return x * std + mean

    return sample


def vp_schedule(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """α and σ of times, in their shape."""
    log_alpha = -0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1
    return torch.exp(log_alpha), torch.sqrt(1 - torch.exp(2 * log_alpha))


def behavior_textbook(table: Batch, device: torch.device) -> Step:
    """One gradient step of the behavior model, batch 4,096."""
    obs, actions, a = table.obs.cpu(), table.actions.cpu(), iql_dare.Args()
    net = iql_dare.BehaviorNet(OBS, ACT, a.behavior_width).to(device)
    opt = torch.optim.Adam(net.parameters(), lr=1e-4)

    def step() -> None:
        index = torch.from_numpy(np.random.randint(0, ROWS, size=a.behavior_batch))
        s, x = obs[index].to(device), actions[index].to(device)
        t = torch.rand(len(s), device=device) * (1 - 1e-3) + 1e-3
        alpha, std = vp_schedule(t)
        z = torch.randn_like(x)
        eps = net(x * alpha[:, None] + z * std[:, None], t, s)
        learn(opt, torch.mean(torch.sum((eps - z) ** 2, dim=-1)))

    return step


def references_textbook(table: Batch, device: torch.device) -> Step:
    """Guided actions of 256 states: DPM-Solver++ 2S, uniform in time, 15 evaluations."""
    a = iql_dare.Args()
    behavior = iql_dare.BehaviorNet(OBS, ACT, a.behavior_width).to(device)
    energy = iql_dare.EnergyNet(OBS, ACT, a.energy_hidden).to(device)

    def denoise(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        alpha, std = vp_schedule(t)
        eps = behavior(x, t, s)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            guidance = a.guidance_scale * torch.autograd.grad(torch.sum(energy(s, x, t)), x)[0]
        return (x.detach() - std[:, None] * (eps - guidance * std[:, None])) / alpha[:, None]

    def half_log_snr(t: torch.Tensor) -> torch.Tensor:
        alpha, std = vp_schedule(t)
        return torch.log(alpha) - torch.log(std)

    def move(x: torch.Tensor, denoised: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        (_, std_s), (alpha, std) = vp_schedule(s), vp_schedule(t)
        shrink = torch.expm1(half_log_snr(s) - half_log_snr(t))
        return (std / std_s)[:, None] * x - (alpha * shrink)[:, None] * denoised

    @torch.no_grad()
    def sample() -> torch.Tensor:
        index = torch.as_tensor(np.random.randint(0, ROWS, size=a.batch_size), device=device)
        obs, x = table.obs[index], torch.randn(a.batch_size, ACT, device=device)
        times = [t.expand(a.batch_size) for t in torch.linspace(1.0, 1e-3, 16, device=device)]
        for s, middle, t in zip(times[0:13:2], times[1:14:2], times[2:15:2], strict=True):
            start, half, end = map(half_log_snr, (s, middle, t))
            first = denoise(x, s, obs)
            second = denoise(move(x, first, s, middle), middle, obs)
            r = (half - start) / (end - start)
            x = move(x, first + (0.5 / r)[:, None] * (second - first), s, t)
        return move(x, denoise(x, times[14], obs), times[14], times[15])

    return sample


# ---- ours ----


def begin_run(module: ModuleType, device: torch.device, compiled: bool, **settings: Any) -> run.Run:
    """A run of that file, quietly; its directory is gone when it comes back."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        settings |= dict(out_dir=Path(folder), device=device.type, compile=compiled)
        args = run.with_presets(module.Args, module.ENV_PRESETS, TASK, **settings)
        return run.Run(args, module.__file__, "bench", module.ENV_PRESETS)


def iql_step(offline: ReplayBuffer, device: torch.device, compiled: bool) -> Step:
    args, nets = iql.Args(), iql.make_nets(OBS, ACT, 256).to(device)
    opt, updates = iql.make_optimizer(nets, args.lr, device), torch.zeros((), device=device)
    losses = torch.compile(iql.losses) if compiled else iql.losses

    def step() -> dict:
        iql.decay_actor_lr(opt, updates, args.lr, args.offline_steps)
        loss, logs = losses(nets, offline.sample(args.batch_size), args)
        iql.update(nets, opt, loss, args.polyak)
        return logs

    return step


def pex_step(offline: ReplayBuffer, device: torch.device, compiled: bool) -> Step:
    args, nets = pex.Args(), pex.make_nets(OBS, ACT, 256).to(device)
    offline_actor = pex.GaussianActor(OBS, ACT, 256).to(device).requires_grad_(False)
    opt = pex.make_optimizer(nets, args.lr, device)
    losses = torch.compile(pex.pex_losses) if compiled else pex.pex_losses

    def step() -> dict:
        batch = offline.sample(args.batch_size)
        draws = torch.randn_like(batch.actions), torch.rand_like(batch.rewards)
        loss, logs = losses(nets, offline_actor, batch, draws, args)
        pex.update(nets, opt, loss, args.polyak)
        return logs

    return step


def calql_step(offline: ReplayBuffer, device: torch.device, compiled: bool) -> Step:
    args, nets = calql.Args(), calql.make_calql_nets(OBS, ACT, 256, 3).to(device)
    opt = calql.make_calql_optimizer(nets, args.policy_lr, args.critic_lr, device)
    returns = torch.randn(len(offline), device=device)
    losses = torch.compile(calql.losses) if compiled else calql.losses

    def step() -> dict:
        index = offline.draw(args.batch_size)
        noise = calql.draw_noise(args.batch_size, ACT, args.cql_n_actions, device)
        loss, logs = losses(nets, offline.take(index), returns[index], args.cql_weight, noise, args)
        calql.update(nets, opt, loss, args.polyak)
        return logs

    return step


def wsrl_step(offline: ReplayBuffer, device: torch.device, compiled: bool) -> Step:
    args, nets = wsrl.Args(), wsrl.make_wsrl_nets(OBS, ACT, 256, 2, 10, True).to(device)
    opt = wsrl.make_wsrl_optimizer(nets, args.policy_lr, args.critic_lr, device)
    losses = [torch.compile(f) if compiled else f for f in (wsrl.critic_losses, wsrl.policy_losses)]
    rows = args.utd * args.batch_size
    return lambda: wsrl.update(nets, opt, offline.sample(rows), *losses, args)


def apl_step(offline: ReplayBuffer, device: torch.device, compiled: bool, capture: Callable) -> Step:
    args = apl.Args()
    nets = apl.make_apl_nets(OBS, ACT, args).to(device)
    opt = apl.make_apl_optimizer(nets, args.policy_lr, args.critic_lr, device)
    losses = torch.compile(apl.losses) if compiled else apl.losses
    online, turns = offline.like(args.fifo_rows), count()
    online.append(offline.table[: args.fifo_rows])

    def update(recent: bool) -> dict:
        batch = apl.draw_oorb(offline, online, args.batch_size, recent, args)
        noise = apl.draw_noise(args.batch_size, ACT, args.cql_n_actions, device)
        draws = *noise, apl.draw_pair(args.n_critics, args.critic_subset, device)
        loss, logs = losses(nets, batch, 0.0 if recent else args.cql_weight, draws, args)
        apl.update(nets, opt, loss, args.polyak)
        return logs

    steps = [capture(partial(update, recent)) for recent in (False, True)]
    return lambda: steps[next(turns) % 2]()


def so2_step(offline: ReplayBuffer, device: torch.device, compiled: bool) -> Step:
    args = so2.Args()
    nets = so2.make_so2_nets(OBS, ACT, 256, args.critic_layers, args.n_critics).to(device)
    opt = so2.make_so2_optimizer(nets, args.policy_lr_online, args.critic_lr_online, device)
    replay = offline.like(ROWS)
    replay.append(offline.table[:ROWS])
    replay.fixed = ROWS - 20_000  # own rows come last
    balance = so2.Balance(replay, OBS, ACT, args, device)
    balance.priorities.assign(torch.arange(replay.fixed, ROWS, device=device), torch.ones((), device=device))
    functions = so2.ratio_losses, so2.value_losses, so2.actor_losses
    of_ratio, *others = [torch.compile(f) if compiled else f for f in functions]
    return lambda: so2.update(nets, opt, partial(balance.draw, of_ratio), replay.fixed, *others, args)


def diffql_step(offline: ReplayBuffer, device: torch.device, compiled: bool) -> Step:
    args = diffql.Args()
    nets = diffql.make_diffql_nets(OBS, ACT, args).to(device)
    opt = diffql.make_diffql_optimizer(nets, args, device)
    losses = torch.compile(diffql.losses) if compiled else diffql.losses

    def step() -> dict:
        batch, draws = offline.sample(args.batch_size), diffql.draw_step(nets["actor"], args, device)
        loss, logs = losses(nets, batch, draws, args)
        diffql.update(nets, opt, loss, args)
        return logs

    return step


def diffuser_step(offline: ReplayBuffer, device: torch.device, compiled: bool) -> Step:
    """Of planner and guide, as online."""
    args = diffuser.Args()
    episodes = diffuser.Episodes(
        offline, offline.take(torch.arange(ROWS)).terminations.cpu().numpy() > 0, args
    )
    nets = diffuser.make_diffuser_nets(episodes, ACT, args).to(device)
    opt = diffuser.make_plan_optimizer(nets, args.lr, device)
    losses = diffuser.planner_loss, diffuser.guide_loss
    planner_loss, guide_loss = [torch.compile(f) if compiled else f for f in losses]

    def step() -> dict:
        planned = planner_loss(nets["planner"], *episodes.weighted())
        diffuser.update(opt, planned)
        diffuser.move_average(nets["average"]["planner"], nets["planner"], nets.planner_updates)
        guided, _ = guide_loss(nets["guide"], *episodes.labelled())
        diffuser.update(opt, guided)
        diffuser.move_average(nets["average"]["guide"], nets["guide"], nets.guide_updates)
        return {"loss/planner": planned.detach(), "loss/guide": guided.detach()}

    return step


def as_it_is(step: Step) -> Step:
    return step


def generator(offline: ReplayBuffer, device: torch.device, compiled: bool) -> synther.Generator:
    """SynthER's: `train_step`, and `sample_step` for a chunk of rows."""
    rows = CHUNK[device.type]
    r = begin_run(synther, device, compiled, synthetic_rows=rows, sample_batch=rows)
    a = r.args
    features = synther.Generator.features(a, offline)
    net = synther.TransitionNet(features, a.diffusion_width, a.diffusion_depth, a.diffusion_time_dim)
    g = synther.Generator(r, a, net, [offline])
    return g


def edm_step(
    offline: ReplayBuffer, device: torch.device, compiled: bool, capture: Callable = as_it_is
) -> Step:
    """A training step, and at every 10th the average, captured apart as in `Generator.learn`."""
    g, steps = generator(offline, device, compiled), count()
    train, average = capture(g.train_step), capture(lambda: g.ema.update(g.net))

    def step() -> None:
        train()
        if next(steps) % edm.EMA.EVERY == 0:
            average()

    return step


def guide(offline: ReplayBuffer, device: torch.device, compiled: bool, **settings: Any) -> iql_dare.Guide:
    """DARE's: `behavior_step`, and `score` of a batch."""
    r, mini = begin_run(iql_dare, device, compiled, **settings), data.load("hopper-mini-v0")
    r.require(dataset=mini.sha256)
    q_target = iql.make_nets(OBS, ACT, 256).to(device)["q_target"]
    return iql_dare.Guide(r, mini, offline, q_target, 1.0)


def references_step(offline: ReplayBuffer, device: torch.device, compiled: bool) -> Step:
    g, log_std = guide(offline, device, compiled), torch.zeros(ACT, device=device)
    g.behavior.requires_grad_(False)  # as when online
    half = g.args.batch_size // 2
    return lambda: g.score(mix(offline.sample(half), offline.sample(half)), log_std)[1]


# ---- the table ----


def workloads(table: Batch, offline: ReplayBuffer, device: torch.device) -> dict[tuple[str, str], tuple]:
    """(what, variant) -> what builds its step, and how many one call makes; ratios are to the variant `textbook`."""
    at, on, chunk = (table, device), (offline, device), CHUNK[device.type]
    both = [
        ("IQL update", partial(iql_textbook, *at), lambda c, capture: capture(iql_step(*on, c))),
        ("PEX update", partial(iql_textbook, *at, expanded=True), lambda c, capture: capture(pex_step(*on, c))),
        ("Cal-QL update", partial(calql_textbook, *at), lambda c, capture: capture(calql_step(*on, c))),
        ("WSRL update", partial(wsrl_textbook, *at), lambda c, capture: capture(wsrl_step(*on, c))),
        ("APL update", partial(apl_textbook, *at), lambda c, capture: apl_step(*on, c, capture)),
        ("SO2 update", partial(so2_textbook, *at), lambda c, capture: capture(so2_step(*on, c))),
        ("Diff-QL update", partial(diffql_textbook, *at), lambda c, capture: capture(diffql_step(*on, c))),
        ("Diffuser update", partial(diffuser_textbook, *at), lambda c, capture: capture(diffuser_step(*on, c))),
        ("EDM training step", partial(edm_textbook, *at), lambda c, capture: edm_step(*on, c, capture)),
        ("EDM sample", partial(sampling_textbook, device, chunk),
         lambda c, capture: capture(generator(*on, c).sample_step)),
        ("behavior step", partial(behavior_textbook, *at),
         lambda c, capture: capture(guide(*on, c).behavior_step)),
        ("guided references", partial(references_textbook, *at),
         lambda c, capture: capture(references_step(*on, c))),
    ]  # fmt: skip
    modes = {"plain": (False, as_it_is), "compiled": (True, as_it_is)}
    if device.type == "cuda":
        modes |= {"plain, captured": (False, CapturedStep), "compiled, captured": (True, CapturedStep)}
    found = {}
    for what, textbook, ours in both:
        builders = {"textbook": textbook} | {name: partial(ours, *mode) for name, mode in modes.items()}
        found |= {(what, k): (make, chunk if what == "EDM sample" else 1) for k, make in builders.items()}
    return found


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)", info.read_text() if info.exists() else "", re.M)
    name = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def waiter(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def prepare(make: Callable[[], Step], cuda: bool, wait: Callable[[], None]) -> tuple[Step, float, float]:
    """The step, compiled and captured; seconds of a call; on a GPU, MiB allocated for it at most."""
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    step = make()
    # APL has steps of two kinds, in turn; the average of the EDM is captured at its fourth call, the 31st step
    for _ in range(60 if cuda else 2):
        step()
    wait()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0
    start = time.perf_counter()
    step(), step()
    wait()
    return step, (time.perf_counter() - start) / 2, memory


def measure(args: Args, device: torch.device) -> list[Row]:
    """The rows of the table."""
    torch.manual_seed(0)
    n, done = torch.randn, (torch.rand(ROWS) < 0.01).float()
    table = Batch(n(ROWS, OBS), n(ROWS, ACT).clamp(-1, 1), n(ROWS), n(ROWS, OBS), done)
    offline = ReplayBuffer(ROWS, OBS, ACT, device)
    offline.extend(table)
    known = workloads(Batch(*(x.to(device) for x in table)), offline, device)
    words = [w.lower() for w in args.only] or [""]
    chosen = {k: v for k, v in known.items() if any(w in k[0].lower() for w in words)}
    if not chosen:
        raise UsageError(
            "--only", " ".join(args.only), "words of: " + ", ".join(dict.fromkeys(what for what, _ in known))
        )
    cuda, wait = device.type == "cuda", waiter(device)
    own = "highest" if cuda else run.cpu_matmul()
    ready, rates = {}, defaultdict(list)
    for (what, name), (make, _) in chosen.items():
        print(f"preparing: {what}, {name}", file=sys.stderr)
        torch.set_float32_matmul_precision("highest" if "textbook" in name else own)
        ready[what, name] = prepare(make, cuda, wait)
    for _ in range(args.rounds):
        for (what, name), (step, seconds, _) in ready.items():
            torch.set_float32_matmul_precision("highest" if "textbook" in name else own)
            calls = 2 * max(round(args.seconds / seconds / 2), 1)
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                step()
            wait()
            rates[what, name].append(calls * chosen[what, name][1] / (time.perf_counter() - start))
    common = dict(device=processor(device), threads="" if cuda else str(args.threads))
    common |= dict(torch=torch.__version__, python=platform.python_version())
    rows = []
    for (what, name), found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates[what, "textbook"], strict=True))
        row = dict(what=what, variant=name, per_second=f"{statistics.median(found):.4g}")
        row |= dict(ratio_to_textbook=f"{ratio:.2f}", peak_mib=f"{ready[what, name][2]:.0f}" if cuda else "")
        rows.append(row | common)
    return rows


def read_rows(path: Path, columns: list[str] = COLUMNS) -> list[Row]:
    """Rows of a kept table; UsageError if it is not one."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        if not rows or any(set(r) != set(columns) or None in r.values() for r in rows):
            raise ValueError("other columns")
    except (OSError, ValueError, csv.Error) as e:
        raise UsageError("--csv", path, f"a table that this program wrote ({type(e).__name__})") from e
    return rows


def grouped(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """What was measured together: (device, threads, what) -> rows."""
    groups = defaultdict(list)
    for r in rows:
        groups[r["device"], r["threads"], r["what"]].append(r)
    return groups


def write_rows(rows: list[Row], path: Path, columns: list[str] = COLUMNS) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run.write_atomically(text.getvalue().encode(), path)


def markdown(rows: list[Row]) -> str:
    """A table per device."""
    machines, parts = defaultdict(list), []
    for r in rows:
        cpu = f", {r['threads']} thread{'s' * (r['threads'] != '1')}" if r["threads"] else ""
        machines[f"{r['device']}{cpu}, torch {r['torch']}:\n"].append(r)
    for machine, own in machines.items():
        columns = [k for k in COLUMNS[:5] if any(r[k] for r in own)]
        heads, lines = [k.replace("_", " ") for k in columns], [[r[k] for k in columns] for r in own]
        parts += [machine, report.table(heads, lines)]
    return "\n".join(parts)


# ---- whole files ----


def few(module: ModuleType, steps: int, cuda: bool, **flags: Any) -> Any:
    """Settings with sizes as published, phases of `steps`, and one regeneration, when the warm-up is over."""
    phases = ("offline", "behavior", "energy", "planner", "guide", "halving", "diffusion", "warmup")
    sizes = {f"{k}_steps": steps for k in phases} | dict(online_steps=2 * steps, regenerate_every=steps)
    sizes |= dict(regenerations=2, energy_updates=steps, eval_every=10**9)
    if cuda:
        sizes |= dict(energy_pool=4 * CHUNK["cuda"])  # not all of it in a first call, with compilation
    else:
        sizes |= dict(
            sample_batch=CHUNK["cpu"], synthetic_rows=2 * CHUNK["cpu"], energy_pool=2 * CHUNK["cpu"]
        )
    sizes = {k: v for k, v in sizes.items() if k in module.Args.__dataclass_fields__} | flags
    make = partial(run.with_presets, module.Args, module.ENV_PRESETS, TASK)
    idle = run.idle_settings(make(**sizes), getattr(module, "NEEDS", {}))
    return make(**{k: v for k, v in sizes.items() if k not in idle})


def measure_file(stem: str, args: Args) -> dict[str, float]:
    """Rates of what `budget` names, and `peak_memory_gib`, of algorithms/<stem>.py; for a process of its own.

    A phase is timed over its second half (online: of the steps with updates), when it is compiled and captured.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    torch.set_num_threads(args.threads)
    module, device, rates = importlib.import_module(f"algorithms.{stem}"), pick_device(args.device), {}
    cuda, wait, spent = device.type == "cuda", waiter(device), defaultdict(float)
    steps = args.steps or (200 if cuda else 20)

    def timed(original: Callable, name: str, units: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = original(*arguments)
            wait()
            spent[name] += time.perf_counter() - start
            rates[name] = units(result, *arguments) / (time.perf_counter() - start)
            return result

        return call

    def timed_phase(self: run.Run, name: str, until: int) -> Iterator[int]:
        first = max(self.done.get(name, 0), steps if name == "online" else 0)
        middle, start = (first + until) // 2, None
        for step in phase(self, name, until):
            if step == middle:
                wait()
                start = time.perf_counter() - spent["evaluation"]
            yield step
            if step == until - 1 and start is not None:  # the evaluation in the last step is not the phase's
                wait()
                rates[name] = (until - middle) / (time.perf_counter() - spent["evaluation"] - start)

    phase, run.Run.phase = run.Run.phase, timed_phase

    def steps_of(result: dict, evaluator: data.Evaluator, *_) -> float:
        return evaluator.episodes * result["eval/length"]

    data.Evaluator.__call__ = timed(data.Evaluator.__call__, "evaluation", steps_of)
    if hasattr(module, "Guide"):
        module.Guide.dataset_support = timed(
            module.Guide.dataset_support, "support", lambda _, guide: guide.support.fixed
        )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        rows = Path(folder) / "rows.hdf5"
        with h5py.File(data.get_task("hopper-mini-v0").path) as mini, h5py.File(rows, "w") as f:
            for k in mini:  # again and again, or the first ones
                f[k] = np.resize(mini[k][()], (1_000_000 if cuda else 600, *mini[k].shape[1:]))
        flags = dict(dataset=rows, out_dir=Path(folder), device=args.device)
        settings = few(module, steps, cuda, **flags)
        result = module.train(settings)
    for name, limit in (("sampling", "synthetic_rows"), ("pool", "energy_pool")):
        if name in rates:  # chunks -> rows
            rates[name] *= min(settings.sample_batch, getattr(settings, limit))
    return rates | {"peak_memory_gib": result["peak_memory_gib"]}


def budget(stem: str, env: str) -> dict[str, float]:
    """What a published run does: phase -> gradient steps; online and evaluation, environment steps; the rest, rows."""
    module, task = importlib.import_module(f"algorithms.{stem}"), data.get_task(env)
    a = run.with_presets(module.Args, module.ENV_PRESETS, env)
    get, rows = lambda name: getattr(a, name, 0), task.rows or 1_000_000
    # regenerations as in the files' loops: CFDG's at equal parts, the others' at multiples; EDIS and AD2S also have one
    # when the warm-up is over
    times = {k * a.online_steps // a.regenerations for k in range(1, get("regenerations"))}
    if get("regenerate_every"):
        times = {*range(a.regenerate_every, a.online_steps, a.regenerate_every)}
        times |= set() if get("synther_data") else {a.warmup_steps}
    n = sum(a.warmup_steps <= t < a.online_steps for t in times)
    work = {k: get(f"{k}_steps") for k in ("offline", "online", "behavior", "energy", "planner", "guide")}
    work |= {"generator": n * get("diffusion_steps"), "sampling": n * get("synthetic_rows")}
    work |= {"pool": n * get("energy_pool")}
    work |= dict.fromkeys(("ratios", "energies"), n * get("energy_updates"))
    ladder = module.halvings(a) if hasattr(module, "halvings") else []  # diffql.py halves only with --distill
    work["distill"] = sum(updates for _, updates in ladder)
    work["transition"] = 2 * get("planner_steps") if get("fit_transition") and a.horizon > 1 else 0
    work["support"] = rows + a.online_steps if get("support_k") else 0
    for phase in ("offline", "online"):  # every episode to its limit
        work[f"evaluation {phase}"] = math.ceil(work[phase] / a.eval_every) * a.eval_episodes * task.limit
    return {k: v for k, v in work.items() if v}


def hours(stem: str, env: str, rates: dict[str, float]) -> dict[str, float]:
    """Of each phase of a published run; NaN where a rate is missing."""
    return {k: v / rates.get(k.split()[0], math.nan) / 3600 for k, v in budget(stem, env).items()}


def backbone_of(stem: str) -> str:
    """Whose offline phase a method starts from, as in run_all.sh."""
    starts = {x: x for x in ("iql", "apl", "wsrl", "so2", "diffql", "diffuser")} | {
        "pex": "iql",
        "dacer": "diffql",
    }
    return starts.get(stem.split("_")[0], "calql")


def whole_list(rates: dict[str, dict[str, float]]) -> str:
    """Hours of the jobs of run_all.sh whose files have `rates`, with what they share counted once.

    That is the offline phase of a backbone, task and seed, and the behavior model of a task, seed and its settings.
    """
    command = ["bash", ROOT / "run_all.sh", "--list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    jobs, once = [line.split()[-3:] for line in lines], {}
    jobs = [job for job in jobs if job[0] in rates]
    for stem, env, seed in jobs:
        own = stem.endswith("dual")  # as in run_all.sh: DUAL's actor is its own
        backbone = stem if own else backbone_of(stem)
        module = importlib.import_module(f"algorithms.{stem}")
        a = run.with_presets(module.Args, module.ENV_PRESETS, env)
        for phase, time_taken in hours(stem, env, rates[stem]).items():
            owner = backbone if phase.endswith("offline") else stem
            if phase == "behavior":
                owner = str([getattr(a, k) for k in module.BEHAVIOR_SETTINGS])
            once.setdefault((phase, owner, env, seed), time_taken)
    total = sum(once.values())
    return f"run_all.sh: {len(jobs)} of {len(lines)} jobs, one after the other: {total:.0f} hours"


def whole_files(args: Args) -> None:
    """Each file through `train` at published sizes, a few steps of every phase; prints rates and projected hours."""
    names = args.files or FILES
    if wrong := [name for name in names if name not in FILES]:
        raise UsageError("--files", " ".join(wrong), " ".join(FILES))
    device, rates = pick_device(args.device), {}
    print(
        f"{processor(device)}, torch {torch.__version__}; settings of {TASK}; hours of one run by itself, with"
    )
    print("evaluations of full length, without checkpoints and reports on generated rows")
    if device.type == "cpu":
        print(
            f"600 dataset rows, {CHUNK['cpu']} rows generated at once: rates scale with them, memory does not"
        )
    for stem in names:
        try:  # a process for each: peak memory is the file's own
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure_file, stem, args).result()
        except Exception as e:
            print(f"{stem}: NOT MEASURED: {type(e).__name__}: {' '.join(str(e).split())[:150]}")
            continue
        memory, rates[stem] = found.pop("peak_memory_gib"), found
        needed = hours(stem, TASK, found)
        print(f"{stem}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()) + f" /s; {memory:.2f} GiB")
        parts = ", ".join(f"{k} {v:.2f}" for k, v in needed.items())
        print(f"  {sum(needed.values()):.1f} hours: {parts}", flush=True)
    print(whole_list(rates) + ", whatever their task at the rates above")
    if missing := [name for name in names if name not in rates]:
        print(f"not measured: {', '.join(missing)}", file=sys.stderr)
        sys.exit(1)


def check(args: Timing, markers: tuple[str, str]) -> None:
    """Refuse what cannot be before, not after, minutes of measuring."""
    for name in ("threads", "rounds", "seconds"):
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name}", getattr(args, name), "above 0")
    if args.from_csv and args.csv is None:
        raise UsageError("--from-csv", "no --csv", "with --csv, the file to read")
    if args.csv and not args.csv.parent.is_dir():
        raise UsageError("--csv", args.csv, "a file in a folder that exists")
    if args.readme:
        report.around(args.readme, markers)


def tell(rows: list[Row], text: str, args: Timing, markers: tuple[str, str], columns: list[str]) -> None:
    """Keep the rows, unless they were read, and their table; print it."""
    if args.csv and not args.from_csv:
        write_rows(rows, args.csv, columns)
    if args.readme:
        report.insert(text, args.readme, markers)
    print(text, end="")


def main(args: Args) -> None:
    check(args, MARKERS)
    if args.files is not None:
        return whole_files(args)
    rows = read_rows(args.csv) if args.csv and (args.from_csv or args.csv.exists()) else []
    if not args.from_csv:
        device = pick_device(args.device)
        if device.type == "cpu":
            torch.set_num_threads(args.threads)
        merged = grouped(rows) | grouped(measure(args, device))
        rows = [r for group in merged.values() for r in group]
    tell(rows, markdown(rows), args, MARKERS, COLUMNS)


if __name__ == "__main__":
    run.main(main, Args)
