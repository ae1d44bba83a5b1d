"""Gradient steps per second at published sizes: ours, plain and (on a GPU) captured, beside a textbook loop.

    python tests/bench.py [--device cpu|cuda] [--rounds 5] [--steps 200] [--files]

One run, interleaved rounds, medians: the ratios mean something even on a busy machine, the rates are this machine's.
The textbook loop is IQL as most repositories have it: one module per network, an optimizer each, host-side numpy
indices, fields gathered one by one, target update parameter by parameter, `.item()` for every loss at every step. That
of Cal-QL also evaluates its two critics and its sampled actions one after another: each of the 30 by itself, or the ten
of each kind together, as CORL does.
"""

import contextlib
import csv
import shutil
import statistics
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro

from algorithms import calql, calql_dare, calql_stratdiff, iql, iql_dare, iql_stratdiff, synther
from common import data, run
from common.buffer import Batch, ReplayBuffer, mix
from common.run import CapturedStep, pick_device

OBS, ACT, ROWS = 11, 3, 200_000  # hopper
CHUNK = 50 if not torch.cuda.is_available() else 10_000  # generated rows at once


@dataclass(frozen=True)
class Args:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 5
    steps: int = 200  # gradient steps per round of each variant
    threads: int = 1  # on a CPU
    files: bool = False  # instead: every file through its own `train`, that many steps of each phase


def textbook(table: Batch, device: torch.device):
    """One IQL gradient step, written the usual way."""

    def mlp(i: int, o: int) -> nn.Sequential:
        layers = nn.Linear(i, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, o)
        return nn.Sequential(*layers).to(device)

    q1, q2, v, mean = mlp(OBS + ACT, 1), mlp(OBS + ACT, 1), mlp(OBS, 1), mlp(OBS, ACT)
    log_std = nn.Parameter(torch.zeros(ACT, device=device))
    target1, target2 = deepcopy(q1), deepcopy(q2)
    v_opt = torch.optim.Adam(v.parameters(), lr=3e-4)
    q_opt = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=3e-4)
    pi_opt = torch.optim.Adam([*mean.parameters(), log_std], lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(pi_opt, 1_000_000)
    log = {}

    def step() -> None:
        rows = torch.as_tensor(np.random.randint(0, ROWS, size=256), device=device)
        s, a, r, s2, d = (x[rows] for x in table)
        with torch.no_grad():
            sa = torch.cat([s, a], 1)
            target_q = torch.min(target1(sa), target2(sa)).squeeze(1)
            next_v = v(s2).squeeze(1)
        adv = target_q - v(s).squeeze(1)
        v_loss = torch.mean(torch.abs(0.7 - (adv < 0).float()) * adv**2)
        log["v"] = v_loss.item()
        v_opt.zero_grad()
        v_loss.backward()
        v_opt.step()
        y = r + (1 - d) * 0.99 * next_v
        q_loss = sum(nn.functional.mse_loss(q(sa).squeeze(1), y) for q in (q1, q2)) / 2
        log["q"] = q_loss.item()
        q_opt.zero_grad()
        q_loss.backward()
        q_opt.step()
        for target, q in ((target1, q1), (target2, q2)):
            for tp, p in zip(target.parameters(), q.parameters(), strict=True):
                tp.data.copy_(0.995 * tp.data + 0.005 * p.data)
        policy = torch.distributions.Normal(torch.tanh(mean(s)), log_std.clamp(-5, 2).exp())
        weight = torch.exp(3.0 * adv.detach()).clamp(max=100.0)
        pi_loss = torch.mean(-weight * policy.log_prob(a).sum(-1))
        log["pi"] = pi_loss.item()
        pi_opt.zero_grad()
        pi_loss.backward()
        pi_opt.step()
        schedule.step()

    return step


def iql_step(offline: ReplayBuffer, device: torch.device, compiled: bool):
    args, nets = iql.Args(), iql.make_nets(OBS, ACT, 256).to(device)
    opt, updates = iql.make_optimizer(nets, args.lr, device), torch.zeros((), device=device)
    losses = torch.compile(iql.losses) if compiled else iql.losses

    def step() -> dict:
        iql.decay_actor_lr(opt, updates, args.lr, args.offline_steps)
        loss, logs = losses(nets, offline.sample(args.batch_size), args)
        iql.update(nets, opt, loss, args.polyak)
        return logs

    return step


def calql_textbook(table: Batch, device: torch.device, together: int):
    """One Cal-QL gradient step, written the usual way; `together` sampled actions per evaluation of a critic."""

    def mlp(i: int, o: int) -> nn.Sequential:
        layers = [m for j in (i, 256, 256) for m in (nn.Linear(j, 256), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(256, o)).to(device)

    q1, q2, pi = mlp(OBS + ACT, 1), mlp(OBS + ACT, 1), mlp(OBS, 2 * ACT)
    target1, target2 = deepcopy(q1), deepcopy(q2)
    log_alpha = torch.zeros(1, device=device, requires_grad=True)
    q_opt = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=3e-4)
    pi_opt, alpha_opt = torch.optim.Adam(pi.parameters(), lr=1e-4), torch.optim.Adam([log_alpha], lr=1e-4)
    returns, log = torch.randn(ROWS, device=device), {}

    def sample(obs: torch.Tensor):
        mean, log_std = pi(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        base = torch.distributions.TransformedDistribution(
            normal, torch.distributions.transforms.TanhTransform(cache_size=1)
        )
        action = base.rsample()
        return action, base.log_prob(action).sum(-1)

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
        q_loss = 0.0
        many = s[:, None].repeat(1, together, 1).view(-1, OBS)
        for q in (q1, q2):
            q_data, terms = q(torch.cat([s, a], 1)).squeeze(1), []
            for kind in ("uniform", "now", "later"):
                for _ in range(0, 10, together):
                    with torch.no_grad():
                        if kind == "uniform":
                            action = torch.rand(256 * together, ACT, device=device) * 2 - 1
                            log_prob = torch.full((256 * together,), -ACT * float(np.log(2)), device=device)
                        else:
                            where = s if kind == "now" else s2
                            action, log_prob = sample(where[:, None].repeat(1, together, 1).view(-1, OBS))
                    value = q(torch.cat([many, action], 1)).view(256, together)
                    if kind != "uniform":
                        value = torch.maximum(value, g[:, None])
                    terms.append(value - log_prob.view(256, together))
            gap = torch.logsumexp(torch.cat(terms, 1), 1) - q_data
            q_loss = q_loss + nn.functional.mse_loss(q_data, y) + 10.0 * gap.clamp(min=-200).mean()
        log.update(alpha=alpha_loss.item(), pi=pi_loss.item(), q=q_loss.item())
        for opt, loss in ((alpha_opt, alpha_loss), (pi_opt, pi_loss), (q_opt, q_loss)):
            opt.zero_grad()
            loss.backward(retain_graph=True)
        for opt in (alpha_opt, pi_opt, q_opt):
            opt.step()
        for target, q in ((target1, q1), (target2, q2)):
            for tp, p in zip(target.parameters(), q.parameters(), strict=True):
                tp.data.copy_(0.995 * tp.data + 0.005 * p.data)

    return step


def calql_step(offline: ReplayBuffer, device: torch.device, compiled: bool):
    args, nets = calql.Args(), calql.make_calql_nets(OBS, ACT, 256, 3).to(device)
    opt = calql.make_calql_optimizer(nets, args.policy_lr, args.critic_lr, device)
    returns = torch.randn(ROWS, device=device)
    losses = torch.compile(calql.losses) if compiled else calql.losses

    def step() -> dict:
        index = offline.draw(args.batch_size)
        noise = calql.draw_noise(args.batch_size, ACT, args.cql_n_actions, device)
        loss, logs = losses(nets, offline.take(index), returns[index], args.cql_weight, noise, args)
        calql.update(nets, opt, loss, args.polyak)
        return logs

    return step


def dare_steps(offline: ReplayBuffer, device: torch.device) -> dict:
    """Behavior step (batch 4096) and the guided references of one batch (256 x 15 evaluations), published sizes."""
    args = iql_dare.Args()
    behavior = iql_dare.BehaviorNet(OBS, ACT, args.behavior_width).to(device)
    energy = iql_dare.EnergyNet(OBS, ACT, args.energy_hidden).to(device)
    fixed = deepcopy(behavior).requires_grad_(False)
    opt = torch.optim.Adam(behavior.parameters(), lr=1e-4, fused=True, capturable=device.type == "cuda")

    def behavior_step() -> dict:
        batch = offline.sample(args.behavior_batch)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            loss = iql_dare.behavior_loss(behavior, batch.obs, batch.actions)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def references(sampler: str) -> dict:
        batch = mix(offline.sample(128), offline.sample(128))
        eps_fn = iql_dare.guided_eps(fixed, energy, batch.obs, args.guidance_scale)
        return {"refs": iql_dare.SAMPLERS[sampler](eps_fn, torch.randn(256, ACT, device=device))}

    return {
        "dare behavior step, batch 4096": behavior_step,
        "dare references, cep": lambda: references("cep"),
        "dare references, fast": lambda: references("fast"),
    }


def edm_steps(offline: ReplayBuffer, device: torch.device) -> dict:
    """EDM training step (width 1024, depth 6, batch 256) and a chunk of CHUNK rows at 128 levels with churn."""
    args = synther.Args(synthetic_rows=CHUNK, sample_batch=CHUNK, device=device.type)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        r = run.Run(replace(args, out_dir=Path(folder)), "synther.py", "bench", {})
    net = synther.TransitionNet(synther.Generator.features(offline), 1_024, 6, 256)
    generator = synther.Generator(r, args, net, offline, OBS, ACT)
    generator.draw = lambda: (synther.union_rows([offline], args.diffusion_batch)[0],)
    generator.begin = lambda n: (generator.denoiser(n), generator.noise(n), 0)
    return {"edm training step": generator.train_step, f"edm chunk of {CHUNK} rows": generator.sample_step}


def whole_files(args: Args) -> None:
    """Each file through `train` at published sizes, a few steps of every phase; prints rates and projected hours."""
    phases = {"offline": 1_000_000, "behavior": 600_000, "energy": 100_000, "online": 200_000}
    modes = (False, True) if pick_device(args.device).type == "cuda" else (False,)
    run.LOG_EVERY = max(args.steps // 4, 1)
    for algorithm in (iql, calql, iql_stratdiff, iql_dare, calql_stratdiff, calql_dare):
        name = Path(algorithm.__file__).stem
        for compiled in modes:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
                rows = Path(shutil.copy(data.get_task("hopper-mini-v0").path, folder))
                few = {f"{phase}_steps": args.steps for phase in phases} | {"online_steps": 2 * args.steps}
                few |= dict(
                    warmup_steps=args.steps,
                    eval_every=10**9,
                    eval_episodes=1,
                    dataset=rows,
                    out_dir=Path(folder),
                )
                few |= dict(device=args.device, compile=compiled)
                known = algorithm.Args.__dataclass_fields__
                few = {k: v for k, v in few.items() if k in known}
                algorithm.train(
                    run.with_presets(algorithm.Args, algorithm.ENV_PRESETS, "hopper-medium-v2", **few)
                )
                (log,) = Path(folder).glob("**/log.csv")
                with open(log, newline="") as f:
                    lines = list(csv.DictReader(f))
            columns = {phase: f"time/{phase}_steps_per_s" for phase in phases}
            last = {
                p: [float(x[c]) for x in lines if x.get(c)][-1] for p, c in columns.items() if c in lines[0]
            }
            hours = sum(phases[p] / rate for p, rate in last.items()) / 3600
            rates = ", ".join(f"{p} {rate:.1f}" for p, rate in last.items())
            print(
                f"{name:16s} {'compiled' if compiled else 'plain':9s} {rates} /s; 1M + 0.2M: {hours:.2f} hours"
            )


def main(args: Args) -> dict[str, float]:
    """Print the table; return steps per second by name."""
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    n = torch.randn
    table = Batch(
        n(ROWS, OBS), n(ROWS, ACT).clamp(-1, 1), n(ROWS), n(ROWS, OBS), (torch.rand(ROWS) < 0.01).float()
    )
    offline = ReplayBuffer(ROWS, OBS, ACT, device)
    offline.extend(table)
    table = Batch(*(x.to(device) for x in table))
    slow = 20 if device.type == "cpu" else 1  # divide the steps of what is slow on a CPU
    variants = {
        "iql textbook": (textbook(table, device), 1),
        "iql plain": (iql_step(offline, device, False), 1),
        "iql compiled": (iql_step(offline, device, True), 1),
        "calql textbook, action by action": (calql_textbook(table, device, 1), slow),
        "calql textbook, kind by kind": (calql_textbook(table, device, 10), slow),
        "calql plain": (calql_step(offline, device, False), slow),
        "calql compiled": (calql_step(offline, device, True), slow),
    }
    variants |= {k: (f, slow) for k, f in dare_steps(offline, device).items()}
    variants |= {k: (f, 10 * slow) for k, f in edm_steps(offline, device).items()}
    if device.type == "cuda":
        variants["iql captured"] = CapturedStep(iql_step(offline, device, False)), 1
        variants["iql compiled, captured"] = CapturedStep(iql_step(offline, device, True)), 1
        variants["calql captured"] = CapturedStep(calql_step(offline, device, False)), 1
        variants["calql compiled, captured"] = CapturedStep(calql_step(offline, device, True)), 1
        variants |= {f"{k}, captured": (CapturedStep(f), 1) for k, f in dare_steps(offline, device).items()}
        variants |= {f"{k}, captured": (CapturedStep(f), 10) for k, f in edm_steps(offline, device).items()}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rates = {name: [] for name in variants}
    for i in range(args.rounds + 1):
        for name, (step, divide) in variants.items():
            count = max(args.steps // divide, 2)
            wait()
            start = time.perf_counter()
            for _ in range(count):
                step()
            wait()
            if i:  # the first round is warm-up
                rates[name].append(count / (time.perf_counter() - start))
    medians = {name: statistics.median(r) for name, r in rates.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {args.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}")
    first = {"iql": "iql textbook", "calql": "calql textbook, action by action"}
    for name, rate in medians.items():
        peer = first.get(name.split()[0])
        ratio = f"  x{rate / medians[peer]:.2f}" if peer else ""
        print(f"{name:42s} {rate:9.1f} /s{ratio}")
    return medians


if __name__ == "__main__":
    chosen = tyro.cli(Args)
    whole_files(chosen) if chosen.files else main(chosen)
