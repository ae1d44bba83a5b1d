"""How long each policy takes for one action online, as a ratio to DUAL's: DUAL's Table 4 and Fig. 2a.

    python tests/acting.py                                                  the table, on this machine
    python tests/acting.py --csv tests/acting.csv --readme README.md        keep it, put it between README's markers
    python tests/acting.py --from-csv --csv tests/acting.csv --readme README.md   measure nothing: what was kept

One observation at a time, through what each file's `train` hands to its environment, networks at published sizes and
hardly trained; for DUAL, the frozen model's error of the step before is part of it. Interleaved rounds in one process:
milliseconds are medians over rounds; ratios, of the rounds' ratios, mean something even on a busy machine. Nothing is
compiled or captured, as in the files.
"""

import contextlib
import importlib
import inspect
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import bench
import h5py
import torch

from algorithms import dacer
from common import data, run
from common.buffer import ReplayBuffer
from common.tools import report

MARKERS = "<!-- acting -->", "<!-- end acting -->"
COLUMNS = ["policy", "command", "milliseconds", "ratio_to_dual", "published", "device", "torch"]
BASE, ENTROPY = "DUAL", "DACER, entropy at every action"
# policy -> (file, its flags, what the paper has: Table 4's ratio, else what it says of Fig. 2a)
POLICIES = {
    BASE: ("dual", {}, "1"),
    "DUAL w/o planner": ("dual", dict(horizon=1, shift_weight=0.0), "0.97"),
    "DUAL w/o distillation": ("dual", dict(distill_steps=32), "31.2"),
    "DUAL w/o epistemic UQ": ("dual", dict(uq="none"), "0.97"),
    "DUAL w/o shift-aware": ("dual", dict(shift_weight=0.0), "1.00"),
    "D-Diffuser": ("diffuser", dict(distill=True), "slightly below 1"),
    "Diffuser": ("diffuser", {}, "much above 1"),
    "D-Diff-QL": ("diffql", dict(distill=True), "slightly below 1"),
    "Diff-QL": ("diffql", {}, "much above 1"),
    "DACER": ("dacer", {}, ""),
    ENTROPY: ("dacer", {}, "slowest"),
    "IQL": ("iql", {}, ""),
    "SO2": ("so2", {}, ""),
}
Row = dict[str, str]


@dataclass(frozen=True)
class Args(bench.Timing):
    """Milliseconds per action online, and ratios to DUAL's."""

    rounds: int = 15
    seconds: float = 0.5


class Ready(Exception):
    """Raised in place of a run's first environment step: with the policy that would have made it."""


def first_policy(stem: str, flags: dict[str, Any], device: torch.device) -> Callable:
    """What algorithms/<stem>.py acts with online: (1, O) -> (1, A); one step of every phase before."""

    def give(_: data.Interaction, policy: Callable) -> None:
        raise Ready(policy)

    module = importlib.import_module(f"algorithms.{stem}")
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.hdf5"
        with h5py.File(data.get_task("hopper-mini-v0").path) as mini, h5py.File(rows, "w") as f:
            for k in mini:
                f[k] = mini[k][:600]
        flags = flags | dict(dataset=rows, out_dir=Path(folder), device=device.type, compile=False)
        args = bench.few(module, 1, False, **flags)
        stack.enter_context(contextlib.redirect_stdout(None))
        stack.enter_context(mock.patch.object(data.Interaction, "step", give))
        stack.enter_context(
            mock.patch.object(data.Evaluator, "__call__", lambda *_: {"eval/score": 0.0, "eval/return": 0.0})
        )
        stack.enter_context(mock.patch.object(data.Evaluator, "export", lambda *_: None))
        try:
            module.train(args)
        except Ready as ready:
            return ready.args[0]
    raise AssertionError(f"{stem} never acts online")


def action(name: str, device: torch.device) -> Callable[[], Any]:
    """One action of a policy, from the environment's observation to what the environment gets."""
    stem, flags, _ = POLICIES[name]
    policy, task = first_policy(stem, flags, device), data.get_task(bench.TASK)
    within, obs = inspect.getclosurevars(policy).nonlocals, torch.randn(1, task.obs_dim)
    if name == ENTROPY:  # as DUAL's text describes DACER: of this state's actions
        actor = inspect.getclosurevars(within["act"]).nonlocals["nets"]["actor"]
        std, args = within["regulator"].std(), dacer.Args()
        return lambda: (policy(obs.to(device)).cpu(), dacer.policy_entropy(actor, obs.to(device), std, args))
    if stem != "dual" or "shift_weight" in flags:
        return lambda: policy(obs.to(device)).cpu()
    row = ReplayBuffer(1, task.obs_dim, task.act_dim, device)
    row.append(torch.randn(1, row.table.shape[1], device=device))
    return lambda: (policy(obs.to(device)).cpu(), within["explorer"].observe(row))  # and d of the next one


def measure(args: Args, device: torch.device) -> list[Row]:
    """The rows of the table."""
    cuda, wait, spent = device.type == "cuda", bench.waiter(device), defaultdict(list)
    torch.set_float32_matmul_precision("highest" if cuda else run.cpu_matmul())
    ready = {name: bench.prepare(partial(action, name, device), cuda, wait) for name in POLICIES}
    for _ in range(args.rounds):
        for name, (act, seconds, _) in ready.items():
            calls = max(round(args.seconds / seconds), 1)
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                act()
            wait()
            spent[name].append((time.perf_counter() - start) / calls)
    machine = bench.processor(device) + ("" if cuda else f", threads: {args.threads}")
    rows = []
    for name, (stem, flags, published) in POLICIES.items():
        words = [stem] + [f"--{k.replace('_', '-')}" + f" {v}" * (v is not True) for k, v in flags.items()]
        ratio = statistics.median(a / b for a, b in zip(spent[name], spent[BASE], strict=True))
        found = statistics.median(spent[name]) * 1_000
        cells = name, " ".join(words), f"{found:.3g}", f"{ratio:.2f}", published, machine, torch.__version__
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def markdown(rows: list[Row]) -> str:
    heads = [k.replace("_", " ") for k in COLUMNS[:5]]
    table = report.table(
        heads, [[r["policy"], f"`{r['command']}`", *(r[k] for k in COLUMNS[2:5])] for r in rows]
    )
    return f"{rows[0]['device']}, torch {rows[0]['torch']}:\n\n{table}"


def main(args: Args) -> None:
    bench.check(args, MARKERS)
    if args.from_csv:
        rows = bench.read_rows(args.csv, COLUMNS)
    else:
        device = run.pick_device(args.device)
        torch.set_num_threads(args.threads)
        rows = measure(args, device)
    bench.tell(rows, markdown(rows), args, MARKERS, COLUMNS)


if __name__ == "__main__":
    run.main(main, Args)
