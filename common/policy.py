"""What acts, as one file that needs nothing of this project.

torch.export.load("policy.pt2").module()(obs)  # raw observations (B, O) float32 -> actions (B, A) in the box

A policy that draws random numbers in evaluation, too, has no deterministic form (`draws` in the file's about.json, and
the run says so): it takes them from torch's global generator, and repeats itself after `torch.manual_seed`.
"""

import io
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.export.passes import move_to_device_pass
from torch.fx.experimental.proxy_tensor import make_fx

from common.run import UsageError, write_atomically


class Raw(nn.Module):
    """`act` with its units: raw observations (B, O) -> actions (B, A) in a box of that center and half width."""

    def __init__(self, act: Callable, moments: tuple | None, center: Any, half: Any, device: torch.device):
        super().__init__()
        self.act, self.normalize = act, moments is not None
        mean, std = moments if self.normalize else (0.0, 1.0)
        for name, value in (("mean", mean), ("std", std), ("middle", center), ("width", half)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32, device=device))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        obs = (obs - self.mean) / self.std if self.normalize else obs
        return self.middle + self.width * self.act(obs).clamp(-1, 1)


def save(policy: Raw, about: dict, path: Path) -> bool:
    """Write `policy` for any number of rows, on the CPU, and return whether it draws random numbers.

    `about` (with obs_dim) goes with it as about.json. Only the weights that act are in it. No random number is used,
    and nothing of the run changes. Raises an error of torch's, or ValueError, if it cannot be had.
    """
    rows = torch.zeros(2, about["obs_dim"], device=policy.mean.device)
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad():  # traced first: export itself does not see through the gradients that a guide takes
        traced = make_fx(policy, tracing_mode="symbolic", _allow_non_fake_inputs=True)(rows)
        program = torch.export.export(traced, (rows,), dynamic_shapes=(batch,), strict=False)
        check(program.module(), policy, rows)
    if rows.is_cuda:
        program = move_to_device_pass(program, "cpu")
    content = io.BytesIO()
    about = about | {"draws": draws(program.module(), rows.cpu()), "torch": torch.__version__}
    torch.export.save(program, content, extra_files={"about.json": json.dumps(about)})
    write_atomically(content.getbuffer(), path)
    return about["draws"]


def check(program: nn.Module, policy: Raw, rows: torch.Tensor) -> None:
    """ValueError unless both act alike on other numbers of rows than `rows`, with which `program` was traced."""
    with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
        for n in (1, 5):
            obs, got = rows.new_tensor(range(n))[:, None] + rows[:1].cos(), []
            for act in (policy, program):
                torch.manual_seed(0)
                got.append(act(obs))
            if got[0].shape != got[1].shape or not torch.allclose(*got, atol=1e-4, equal_nan=True):
                raise ValueError(
                    "other numbers of rows do not act alike; len(obs)? obs.shape[0] can be traced"
                )


def draws(policy: nn.Module, obs: torch.Tensor) -> bool:
    """Does it draw random numbers?"""
    with torch.random.fork_rng([]), torch.no_grad():
        before = torch.get_rng_state()
        policy(obs)
        return not torch.equal(before, torch.get_rng_state())


def load(path: Path) -> tuple[nn.Module, dict]:
    """The policy in a file and what it says of itself; raises UsageError if it is not one."""
    extra = {"about.json": ""}
    logging.getLogger("torch.export").setLevel(
        logging.ERROR
    )  # of what is no export it tells more than the one line
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise zipfile.BadZipFile(bad)
        module = torch.export.load(path, extra_files=extra).module()
        return module, json.loads(extra["about.json"])
    except Exception as e:  # whatever a damaged archive raises
        raise UsageError(
            "policy", f"{type(e).__name__} at {path}", "an intact policy.pt2, as runs write it"
        ) from e
