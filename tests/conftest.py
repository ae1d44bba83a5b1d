"""What several test files need: one torch thread, a small dataset, and settings that finish in seconds."""

import csv
import importlib
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common import data, envs, files, policy, run
from common.tools import collect

ROOT = Path(__file__).parent.parent
FILES = sorted(p.stem for p in (ROOT / "algorithms").glob("*.py"))
CPU = torch.device("cpu")
HOPPER = "hopper-medium-v2"
TINY = dict(  # by setting; a file takes those it has
    device="cpu", offline_steps=20, online_steps=30, warmup_steps=10, eval_every=15, eval_episodes=2,
    batch_size=16, hidden=16, behavior_steps=20, behavior_batch=32, behavior_width=16, energy_steps=10,
    energy_batch=16, energy_hidden=16, support_k=3, support_every=7, cql_n_actions=2,
    regenerate_every=11, regenerations=3, synthetic_rows=40, diffusion_steps=15, diffusion_batch=16, diffusion_width=16,
    diffusion_depth=2, diffusion_time_dim=8, sample_steps=6, sample_churn=0.0, sample_batch=25,
    energy_updates=7, energy_groups=8, energy_width=16, energy_pool=45,
    scorer_hidden=16, scorer_batch=16, eval_random=0.5,  # else PEX's new policy may never show in a score
    planner_steps=20, planner_batch=16, planner_width=16, planner_blocks=1, teacher_steps=4, halving_steps=6,
    laplace_draws=3, laplace_every=7, laplace_rows=50, fifo_rows=8, fifo_from=12, ratio_batch=16, ratio_hidden=16,
    alpha_every=7, entropy_states=8, entropy_samples=20, em_steps=5,
    guide_steps=20, denoise_steps=3, plans=4,
)  # fmt: skip


def pytest_configure() -> None:
    torch.set_num_threads(1)


def module(stem: str):
    """algorithms/<stem>.py, imported."""
    return importlib.import_module(f"algorithms.{stem}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end the others' processes would wait for it."""
    items.sort(key=lambda x: x.name != "test_every_command_in_readme_runs")


def tiny_args(stem: str, **changes):
    """Settings of algorithms/<stem>.py that train in a second or two; no preset. Sizes without effect are left out."""
    args_type, needs = module(stem).Args, getattr(module(stem), "NEEDS", {})
    small = {k: v for k, v in TINY.items() if k in args_type.__dataclass_fields__}
    if args_type.utd > 4:
        small["utd"] = 3  # else most of the suite's time would go to these files
    args = args_type(env="hopper-medium-v2", **small | changes)
    idle = {k for x, names in needs.items() if not eval(x, {}, vars(args)) for k in names} - set(changes)
    return args_type(env="hopper-medium-v2", **{k: v for k, v in small.items() if k not in idle} | changes)


def write(path: Path, arrays: dict, **options) -> Path:
    """`arrays` as an HDF5 file."""
    with h5py.File(path, "w") as f:
        for k, v in arrays.items():
            f.create_dataset(k, data=v, **options)
    return path


def good(rows: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of a flawless Hopper file; the last row is a terminal."""
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(rows, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) == rows - 1,
        "timeouts": np.zeros(rows, bool),
        "next_observations": rng.normal(size=(rows, 11)).astype(np.float32),
    }


@pytest.fixture(scope="session")
def random_rows(tmp_path_factory) -> Path:
    """600 rows of random Hopper roll-outs in D4RL layout."""
    env, rng = envs.locomotion("Hopper-v4"), np.random.default_rng(0)
    parts = [collect.rollout(env, lambda _: rng.uniform(-1, 1, 3), seed) for seed in range(60)]
    path = tmp_path_factory.mktemp("data") / "random.hdf5"
    files.write_d4rl(path, collect.concatenate(parts, 600), {})
    return path


@pytest.fixture
def dataset(random_rows, tmp_path_factory) -> Path:
    """The same file in a folder of its own."""
    return Path(shutil.copy(random_rows, tmp_path_factory.mktemp("data")))


@pytest.fixture
def minari_home(tmp_path, monkeypatch):
    """An empty Minari folder, no network, nothing cached."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data._minari.cache_clear()
    yield tmp_path / "minari"
    data._minari.cache_clear()


def log_rows(folder: Path, times: bool = False) -> list[dict[str, str]]:
    """The lines of the one log.csv below `folder`, without times unless asked."""
    (path,) = folder.glob("**/log.csv")
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if times or k[:5] != "time/"} for row in csv.DictReader(f)]


def final_state(folder: Path) -> dict:
    """The objects in the one state.pt below `folder`."""
    (path,) = folder.glob("**/state.pt")
    return torch.load(path, weights_only=True)["objects"]


def equal_states(a, b) -> bool:
    """Whether two state dictionaries agree bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[k], b[k]) for k in a)
    return a == b if not isinstance(a, list) else all(map(equal_states, a, b))


def cached(out_dir: Path) -> list[Path]:
    """The behavior models that the runs below `out_dir` share."""
    return sorted(out_dir.glob(".behavior/*.pt"))


class Killed(Exception):
    """Stands for kill -9: nothing is written after it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, owner, name: str, calls: int) -> None:
    """Let `owner.name` be called so many times, then die of every call."""
    original, left = getattr(owner, name), [calls]

    def deadly(*args):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(*args)

    monkeypatch.setattr(owner, name, deadly)


@pytest.fixture(autouse=True)
def quick_exports(request, monkeypatch) -> None:
    """An export takes a second, and many tests train: only those of the policy's file export for real."""

    def pretend(_, about: dict, path: Path) -> bool:
        path.write_text(str(about))
        return False

    if request.path.stem not in ("test_policy", "test_play"):
        monkeypatch.setattr(policy, "save", pretend)


@pytest.fixture(autouse=True)
def frequent_logs(monkeypatch) -> None:
    monkeypatch.setattr(run, "LOG_EVERY", 5)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch) -> None:
    """No power is lost in a test: files need not reach the disk; a run writes seventy, 5 ms each."""
    monkeypatch.setattr(run.os, "fsync", lambda _: None)
