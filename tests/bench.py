"""Gradient steps per second at published sizes: ours, plain and (on a GPU) captured, beside a textbook loop.

    python tests/bench.py [--device cpu|cuda] [--rounds 5] [--steps 200]

One run, interleaved rounds, medians: the ratios mean something even on a busy machine, the rates are this machine's.
The textbook loop is IQL as most repositories have it: one module per network, an optimizer each, host-side numpy
indices, fields gathered one by one, target update parameter by parameter, `.item()` for every loss at every step.
"""

import statistics
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro

from algorithms import iql, iql_dare
from common.buffer import Batch, ReplayBuffer, mix
from common.run import CapturedStep, pick_device

OBS, ACT, ROWS = 11, 3, 200_000  # hopper


@dataclass(frozen=True)
class Args:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 5
    steps: int = 200  # gradient steps per round of each variant


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


def main(args: Args) -> dict[str, float]:
    """Print the table; return steps per second by name."""
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    n = torch.randn
    table = Batch(
        n(ROWS, OBS), n(ROWS, ACT).clamp(-1, 1), n(ROWS), n(ROWS, OBS), (torch.rand(ROWS) < 0.01).float()
    )
    offline = ReplayBuffer(ROWS, OBS, ACT, device)
    offline.extend(table)
    table = Batch(*(x.to(device) for x in table))
    variants = {
        "iql textbook": (textbook(table, device), 1),
        "iql plain": (iql_step(offline, device, False), 1),
    }
    slow = 20 if device.type == "cpu" else 1  # divide the steps of what is slow on a CPU
    variants["iql compiled"] = iql_step(offline, device, True), 1
    variants |= {k: (f, slow) for k, f in dare_steps(offline, device).items()}
    if device.type == "cuda":
        variants["iql captured"] = CapturedStep(iql_step(offline, device, False)), 1
        variants["iql compiled, captured"] = CapturedStep(iql_step(offline, device, True)), 1
        variants |= {f"{k}, captured": (CapturedStep(f), 1) for k, f in dare_steps(offline, device).items()}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rates = {name: [] for name in variants}
    for i in range(args.rounds + 1):
        for name, (step, divide) in variants.items():
            count = max(args.steps // divide, 5)
            wait()
            start = time.perf_counter()
            for _ in range(count):
                step()
            wait()
            if i:  # the first round is warm-up
                rates[name].append(count / (time.perf_counter() - start))
    medians = {name: statistics.median(r) for name, r in rates.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu, one thread"
    print(f"{where}, torch {torch.__version__}")
    for name, rate in medians.items():
        ratio = f"  x{rate / medians['iql textbook']:.2f}" if name.startswith("iql") else ""
        print(f"{name:42s} {rate:9.1f} /s{ratio}")
    return medians


if __name__ == "__main__":
    main(tyro.cli(Args))
