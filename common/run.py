"""One run: settings, device, seeds, directory, log, progress, checkpoints, and the captured gradient step.

A run lives in `<out_dir>/<file>/<env>/seed<k>/`:
  args.json   every setting with its origin, commit, versions, dataset hash
  log.csv     one line per logging event; losses, evaluations, updates per second
  state.pt    the checkpoint; the same command again goes on from it, bit for bit on a CPU
  offline.pt  what `--from-offline` of another run reads; behavior.pt likewise
  policy.pt2  what acts, for other programs (policy.py); of the end of the offline phase until the run is finished
  progress.json  of an unfinished run: phase, step, speed, time left
  .lock       held by the process that trains here
  final.json  what `train` returns; its presence means finished
"""

import csv
import errno
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, fields
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from tqdm import tqdm

from common import usage

try:
    import resource
except ImportError:  # Windows
    resource = None

CHECKPOINT_SECONDS = 60.0  # wall time between checkpoints; evaluations and ends of phases write one anyway
LOG_EVERY = 1_000  # steps of the running phase between two lines of losses
TELL_SECONDS = 5.0  # wall time between two looks at speed and time left: the bar's, and progress.json
MAIN = "offline", "online"  # the two phases of every run; others lie before, between and within them
BAR = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} {rate_fmt}{postfix}"
# settings that may change on resume
NOT_COMPARED = {"device", "compile", "out_dir", "wandb", "tensorboard", "overwrite", "dataset"}

# The range of a number stands with the setting, in its file: "(" and ")" exclude the end.
Natural, Count, Several = (Annotated[int, f"[{n}, inf)"] for n in range(3))
Number, Positive, Weight = (Annotated[float, x] for x in ("(-inf, inf)", "(0, inf)", "[0, inf)"))
Share, Fraction, Portion, Rate = (Annotated[float, x] for x in ("[0, 1]", "(0, 1)", "[0, 1)", "(0, 1]"))


class UsageError(ValueError):
    """A user's mistake: setting, value, what is allowed. On the command line: one line on stderr, exit 2."""

    def __init__(self, setting: str, value: object, allowed: str):
        super().__init__(f"{setting}: got {value}; allowed: {allowed}")


# ---- settings ----


def with_presets(args_type: type, presets: dict[str, dict], env: str, **flags) -> Any:
    """`args_type(env)` with the rows of `presets` whose prefix fits `env` (later rows win), then `flags`."""
    row = {k: v for prefix, values in presets.items() if env.startswith(prefix) for k, v in values.items()}
    return args_type(**{"env": env, **row, **flags})


def parse_args(args_type: type, presets: dict[str, dict] | None = None) -> Any:
    """Command line -> settings: class default < preset of the task < flag. Bad usage: one line, exit 2."""

    switch = {"--compile": ["--compile", "True"], "--no-compile": ["--compile", "False"]}  # None is neither
    words = [word for arg in sys.argv[1:] for word in switch.get(arg, [arg])]
    if presets is not None and not {"-h", "--help"}.isdisjoint(words):
        env = [args_type.env, *re.findall(r"(?<!\S)--env[= ](\S+)", " ".join(words))][-1]
        print(usage.help_text(with_presets(args_type, presets, env)))
        sys.exit()

    def cli(**kwargs) -> Any:
        text = io.StringIO()
        try:
            with redirect_stderr(text):
                return tyro.cli(args_type, args=words, **kwargs)
        except SystemExit as e:
            if e.code and text.getvalue():  # tyro draws a box; keep its words (none: a signal)
                plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯├┤─]", " ", text.getvalue())
                print("error: " + " ".join(plain.split()), file=sys.stderr)
            raise

    args = cli()  # with presets: only to learn the task
    return cli(default=with_presets(args_type, presets, args.env)) if presets is not None else args


def check_limits(args: Any) -> None:
    """Raise UsageError for a number outside the range of its setting, NaN included."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for limits in getattr(hint, "__metadata__", ()):
            low, high = (float(x) for x in limits[1:-1].split(","))
            above = value > low if limits[0] == "(" else value >= low
            below = value < high if limits[-1] == ")" else value <= high
            if not (above and below):
                raise UsageError(flag(name), value, limits)


def idle_settings(args: Any, needs: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Setting without effect -> what it lacks. `needs`: condition on the settings -> what has no effect without it."""
    return {name: x for x, names in needs.items() if not eval(x, {}, vars(args)) for name in names}


def check_needs(args: Any, presets: dict[str, dict], needs: dict[str, tuple[str, ...]]) -> None:
    """Raise UsageError for a flag without effect, which is not its default."""
    idle = idle_settings(args, needs)
    for name, value in given(args, presets).items():
        if name in idle and value != type(args).__dataclass_fields__[name].default:  # as Args(env=...) has it
            raise UsageError(flag(name), value, f"its default, as it has no effect unless {idle[name]}")


def check_batch(args: Any, **rows: int) -> None:
    """Raise UsageError unless there is a row of each kind in a batch; `rows`: kind -> number."""
    if min(rows.values()) < 1:
        shares = ["batch_size", *(f.name for f in fields(args) if f.name.endswith("_frac"))]
        given_by = ", ".join(f"{flag(k)} {getattr(args, k):g}" for k in shares)
        got = ", ".join(f"{n} {kind}" for kind, n in rows.items())
        raise UsageError("rows of a batch", got, f"at least one of each, from {given_by}")


def given(args: Any, presets: dict[str, dict] | None) -> dict[str, Any]:
    """The settings that neither the class nor the task's preset has: what flags changed."""
    usual = with_presets(type(args), presets or {}, args.env)
    return {f.name: v for f in fields(args) if (v := getattr(args, f.name)) != getattr(usual, f.name)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def suspects(args: Any, presets: dict[str, dict] | None) -> str:
    """What to change after a divergence: the numbers given by flag, or the learning rates."""
    numbers = {k: v for k, v in given(args, presets).items() if type(v) is float}
    rates = {f.name: getattr(args, f.name) for f in fields(args) if f.name.endswith("lr")}
    return "likely: " + ", ".join(f"{flag(k)} {v:g}" for k, v in (numbers or rates).items())


def main(program: Callable, args_type: type, presets: dict[str, dict] | None = None) -> None:
    """What stands behind `if __name__ == "__main__"`: parse, run, and the exit codes 0, 1, 2, 130, 143."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = None
    try:
        args = parse_args(args_type, presets)
        program(args)
    except UsageError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as e:
        print(f"error: {e}; {suspects(args, presets)}; the last checkpoint is kept", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        full, wrong = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EROFS, errno.EACCES, errno.ENOTDIR)
        if e.errno not in (*full, *wrong, errno.EEXIST):
            raise
        print(f"error: cannot write {e.filename or 'file'}: {e.strerror}", file=sys.stderr)
        sys.exit(1 if e.errno in full else 2)


# ---- files ----


def write_atomically(content: bytes | memoryview, path: Path) -> None:
    """Written aside, synced, renamed: `path` is the old file or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from e


def save_atomically(state: dict, path: Path) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # via memory, or a full disk becomes an opaque C++ error
    write_atomically(buffer.getbuffer(), path)


def write_json(value: dict, path: Path) -> None:
    """A small JSON file, atomically."""
    write_atomically((json.dumps(value, indent=1) + "\n").encode(), path)


def read_json(path: Path) -> dict:
    """What write_json wrote; UsageError if it is something else."""
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        allowed = "an intact one, or --overwrite to start anew"
        raise UsageError("run directory", f"damaged {path}", allowed) from e


def load_state(path: Path, device: torch.device) -> dict:
    """Read a checkpoint; tensors and plain containers only, nothing executable."""
    try:
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as e:
        raise UsageError("checkpoint", path, f"a file written by this program ({type(e).__name__})") from e


def code_of(*parts: Callable) -> str:
    """Hash of the source of functions and classes: with its settings, what shapes a phase that runs share."""
    return hashlib.sha256("".join(map(inspect.getsource, parts)).encode()).hexdigest()[:16]


def git_commit() -> str:
    """Commit of the source tree, "+" appended if it has changes; "unknown" outside git."""
    try:
        git = partial(subprocess.run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        return commit + ("+" if git(["git", "status", "--porcelain"]).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def made_by() -> dict[str, Any]:
    """Commit and versions: what args.json says of the code."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"commit": git_commit(), "versions": versions}


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- the run ----


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where it works; `cuda` where it does not work is a usage error."""
    try:
        if name != "cpu":
            torch.zeros(1, device="cuda").add_(1).item()
            return torch.device("cuda")
    except (RuntimeError, AssertionError) as e:
        if name == "cuda":
            reason = str(e).split("\n")[0]
            raise UsageError("--device", "cuda", f"cpu or auto on this machine ({reason})") from e
    return torch.device("cpu")


@cache
def cpu_matmul() -> str:
    """For torch.set_float32_matmul_precision on a CPU: "medium" where that is faster and still float32, or "highest".

    "medium" is oneDNN: with AVX-512 about twice as fast as the default; with AMX it would round to bfloat16. So it is
    tried: errors are about 1e-6 in float32, 1e-3 in bfloat16.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "highest"
    before, errors = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision("medium")
    for rows in (256, 4_096):
        x = torch.linspace(-1, 1, rows * 256).sin().view(rows, 256)
        y = torch.linspace(-1, 1, 256 * 256).cos().view(256, 256) / 256
        errors.append((x @ y - x.double() @ y.double()).abs().max().item())
    torch.set_float32_matmul_precision(before)
    return "medium" if max(errors) < 1e-5 else "highest"


def peak_memory(device: torch.device, before: float = 0.0) -> float:
    """GiB at most so far, and `before`: what PyTorch held on the GPU; without one, the memory of the process.

    Windows does not tell: `before`.
    """
    if device.type == "cuda":
        return max(before, torch.cuda.max_memory_reserved() / 2**30)
    if resource is None:
        return before
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return max(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def lock_of(folder: Path) -> FileLock:
    """Who has it acquired is the one process that trains in `folder`; it ends with the process."""
    return FileLock(folder / ".lock", thread_local=False)


class Run:
    """Directory, log and state of one training run. Fields to read: `device`, `compile`, `dir`, `final`."""

    def __init__(
        self, args: Any, file: str, dataset_name: str, presets: dict[str, dict], needs: dict | None = None
    ):
        """`args` has every algorithm's common flags; `file` is the algorithm's __file__; raises UsageError.

        `dataset_name` is the folder under which the run is filed: the task, or `<task>@<file stem>`; `presets` says
        which settings come from where, `needs` which have no effect when (check_needs).
        """
        check_limits(args)
        check_needs(args, presets, needs or {})
        if 0 < args.online_steps <= args.warmup_steps:
            allowed = f"less than the {args.online_steps} online steps, or nothing is learned from them"
            raise UsageError("--warmup-steps", args.warmup_steps, allowed)
        self.args = args
        self.device = pick_device(args.device)
        self.compile = args.compile if args.compile is not None else self.device.type == "cuda"
        if self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # small networks; two spinning threads on busy cores are far slower
        torch.set_float32_matmul_precision(cpu_matmul() if self.device.type == "cpu" else "highest")
        torch.manual_seed(args.seed)
        self.dir = Path(args.out_dir) / Path(file).stem / dataset_name / f"seed{args.seed}"
        self.dir.mkdir(parents=True, exist_ok=True)
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise UsageError("--tensorboard", True, "with its package: pip install tensorboard")
        lock = lock_of(self.dir)
        try:
            lock.acquire(timeout=0.5)  # somebody may just look whether a process has it
        except Timeout as e:
            raise UsageError("run directory", self.dir, "one that no other process is using") from e
        self.release, self.lock = weakref.finalize(self, lock.release), Path(lock.lock_file)
        self.anew = args.overwrite  # what is there does not count, and is removed by `_begin`
        for name, path in vars(args).items() if self.anew else ():
            if name.startswith("from_") and path is not None:
                self._check_source(name.removeprefix("from_"), path)
        self.objects: dict[str, Any] = {}
        self.done: dict[str, int] = {}  # steps finished, per phase
        self.passed: list[str] = []  # names that `once` was asked for
        self.seconds: dict[str, float] = {}  # wall time spent, per phase
        self.starts: dict[str, float] = {}  # wall time spent before a phase
        self.scores: dict[str, list[float]] = {}  # eval/score, per phase
        self.memory = 0.0  # GiB, at most
        self.rows: list[dict] = []  # of log.csv
        self.current = "offline"  # phase
        self.bar: tqdm | None = None
        self.wandb = None
        self.boards: dict[str, Any] = {}  # TensorBoard's writers, per phase
        self.saved_at = self.told_at = time.monotonic()
        self.clock = (time.monotonic(), 0)  # of the last log line: time, step
        self._settle_args(presets)
        if self.final:
            print(f"{self.dir}: finished; --overwrite starts anew")

    @property
    def final(self) -> dict[str, float] | None:
        """Contents of final.json if this run is finished."""
        path = self.dir / "final.json"
        return read_json(path) if path.exists() and not self.anew else None

    def _settle_args(self, presets: dict[str, dict]) -> None:
        """Compare with the args.json of a run that has begun; `register` writes it."""
        path = self.dir / "args.json"
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.args).items()}
        settings = {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in settings.items()}
        if path.exists() and not self.anew and ((self.dir / "state.pt").exists() or self.final):
            self.info = read_json(path)
            before = {k: v["value"] for k, v in self.info["settings"].items()}
            pairs = {
                k: (before.get(k), settings.get(k)) for k in {**before, **settings} if k not in NOT_COMPARED
            }
            changed = [f"{k} {old} -> {new}" for k, (old, new) in pairs.items() if old != new]
            if changed:
                allowed = "the settings it was started with, another --out-dir, or --overwrite"
                raise UsageError(f"settings of {self.dir}", ", ".join(changed), allowed)
            file = self.args.dataset
            if self.final and file is not None and file.is_file():  # an unfinished run reads it anyway
                self.require(dataset=sha256_of(file))
            before, now = ({"commit": x["commit"], **x["versions"]} for x in (self.info, made_by()))
            other = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
            if other and not self.final:
                print(f"note: {self.dir} was begun with other code: {', '.join(other)}", file=sys.stderr)
            return
        defaults = {f.name: f.default for f in fields(self.args)}
        origin = {k: "default" if v == defaults[k] else "preset" for k, v in asdict(self.args).items()}
        origin |= dict.fromkeys({"env", *given(self.args, presets)}, "flag")
        told = [f"{k}={settings[k]} ({o})" for k, o in origin.items() if o != "default"]
        print(f"{self.dir}: {self.device}, compile {self.compile}; not default: {', '.join(told)}")
        cuda = self.device.type == "cuda"
        self.info = {
            "settings": {k: {"value": v, "origin": origin[k]} for k, v in settings.items()},
            "command": " ".join(sys.argv),
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
            **made_by(),
        }

    def require(self, **facts: str) -> None:
        """Facts that must be the same each time the run is taken up, such as the dataset's hash."""
        for k, v in facts.items():
            if self.info.setdefault(k, v) != v:
                raise UsageError(f"{k} of {self.dir}", v, f"{self.info[k]}, as when the run was started")

    def settings(self, names: Iterable[str]) -> dict:
        """Those settings and the dataset's hash: what a phase that others may import depends on."""
        return {k: getattr(self.args, k) for k in names} | {"dataset": self.info["dataset"]}

    # -- state --

    def register(self, **objects: Any) -> None:
        """Everything that a checkpoint holds, by name: tensors and things with state_dict/load_state_dict.

        If there is a checkpoint, it is loaded here, into the objects as they are (tensors keep their addresses),
        in the order of the arguments. Call once, after everything is built and before anything is captured.
        """
        self.objects = objects
        if not self.anew:
            write_json(self.info, self.dir / "args.json")
        path = self.dir / "state.pt"
        if path.exists() and not self.anew:
            state = load_state(path, self.device)
            self._restore(objects, state, path)
            self.done, self.passed = state["done"], state["passed"]
            self.seconds, self.scores = state["seconds"], state["scores"]
            self.memory = state.get("memory", 0.0)  # not in checkpoints of older versions, nor are
            self.starts = state.get("starts", {})
            torch.set_rng_state(state["rng"].cpu())
            if self.device.type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
            self._load_rows(state["log_rows"])
            print(f"{self.dir}: resumed at " + ", ".join(f"{k} {v}" for k, v in self.done.items() if v))
        if self.args.wandb:
            self._start_wandb()

    def _begin(self) -> None:
        """Remove what --overwrite replaces: by the first phase, as up to there the command may be refused."""
        if self.anew:
            for old in self.dir.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)  # tensorboard
                elif old != self.lock:
                    old.unlink()
            self.anew = False
            write_json(self.info, self.dir / "args.json")

    def _restore(self, objects: dict[str, Any], state: dict, path: Path) -> None:
        try:
            for name, obj in objects.items():
                restore(obj, state["objects"][name])
        except (KeyError, ValueError, RuntimeError) as e:
            reason = " ".join(str(e).split())[:100]
            raise UsageError("checkpoint", path, f"one that this version of the file wrote ({reason})") from e

    def checkpoint(self) -> None:
        """Write state.pt: the registered objects, counters, random states.

        Raises FloatingPointError, and keeps the last one, if a network is not finite.
        """
        self._tick()
        for name, obj in self.objects.items():
            if isinstance(obj, torch.nn.Module) and not all(p.isfinite().all() for p in obj.parameters()):
                raise FloatingPointError(
                    f"{name} not finite at {self.current} step {self.done[self.current]}"
                )
        objects = self.objects.items()
        state = {
            "objects": {k: v if isinstance(v, torch.Tensor) else v.state_dict() for k, v in objects},
            "done": self.done,
            "passed": self.passed,
            "seconds": self.seconds,
            "starts": self.starts,
            "scores": self.scores,
            "memory": peak_memory(self.device, self.memory),
            "rng": torch.get_rng_state(),
            "log_rows": len(self.rows),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        self._write_rows()
        save_atomically(state, self.dir / "state.pt")
        self.saved_at = time.monotonic()

    def export_phase(self, phase: str, settings: dict, **objects: Any) -> dict:
        """Write <phase>.pt for `--from-<phase>`: the objects' states and the settings that shaped them; returns it."""
        state = {"settings": settings, "objects": {k: v.state_dict() for k, v in objects.items()}}
        save_atomically(state, self.dir / f"{phase}.pt")
        return state

    def _check_source(self, phase: str, path: Path) -> Path:
        """The <phase>.pt that --from-<phase> `path` means; UsageError if there is none, or --overwrite removes it."""
        file = path / f"{phase}.pt" if path.is_dir() else path
        if not file.exists():
            allowed = f"a {phase}.pt, or a run directory whose {phase} phase is over"
            raise UsageError(f"--from-{phase}", file, allowed)
        if self.anew and file.resolve().is_relative_to(self.dir.resolve()):
            raise UsageError(f"--from-{phase}", file, "another run's: --overwrite removes this one")
        return file

    def import_phase(self, phase: str, path: Path, settings: dict, **objects: Any) -> None:
        """Load the <phase>.pt at `path` (or in that run directory) instead of the phase; UsageError if it differs."""
        flag, path = f"--from-{phase}", self._check_source(phase, path)
        state = load_state(path, self.device)
        theirs = state.get("settings", {})
        keys = [k for k in {**theirs, **settings} if theirs.get(k) != settings.get(k)]
        changed = [f"{k} {theirs.get(k)} -> {settings.get(k)}" for k in keys]
        if changed:
            raise UsageError(flag, ", ".join(changed), f"the settings of that run's {phase} phase")
        self._restore(objects, state, path)
        self.done[phase] = getattr(self.args, f"{phase}_steps")
        print(f"{self.dir}: {phase} phase of {path}")

    # -- phases --

    def once(self, name: str) -> bool:
        """True the first time in the life of this run, resumed or not: for what happens between phases."""
        first = name not in self.passed
        self.passed += [name] if first else []
        return first

    def seed(self, name: str) -> None:
        """Random numbers from `--seed` and `name` alone, whatever was drawn before."""
        digest = hashlib.sha256(f"{self.args.seed} {name}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big"))

    def phase(self, name: str, steps: int) -> Iterator[int]:
        """Yield the steps of a phase still to do; checkpoint by the clock, at the end, and on a signal.

        Each phase has random numbers of its own: it goes on alike, whether those before it ran here or were imported.
        """
        self._begin()
        self.current, first = name, self.done.setdefault(name, 0)
        if first >= steps:
            return
        if first == 0:
            self.seed(name)
            self.starts[name] = sum(self.seconds.values())
        self._started, self.clock = time.monotonic(), (time.monotonic(), first)
        caught: list[int] = []

        def on_signal(number: int, _) -> None:
            if caught:  # the second time: at once
                sys.exit(128 + number)
            caught.append(number)

        main_thread = threading.current_thread() is threading.main_thread()
        handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM) if main_thread}
        total = max(steps, getattr(self.args, f"{name}_steps")) if name in MAIN else steps
        self.bar = tqdm(
            total=total, initial=first, desc=self._title(), disable=None, bar_format=BAR, dynamic_ncols=True
        )
        try:
            for step in range(first, steps):
                yield step
                self.done[name] = step + 1
                self.bar.update()
                if caught:
                    self.checkpoint()
                    told = f"{self.dir}: stopped at {name} step {step + 1}, checkpoint written"
                    print(told, file=sys.stderr)
                    sys.exit(128 + caught[0])
                now = time.monotonic()
                if now - self.told_at > TELL_SECONDS:
                    self._tell()
                if now - self.saved_at > CHECKPOINT_SECONDS:
                    self.checkpoint()
            self._tell()
            self.checkpoint()
        finally:
            self.bar.close()
            self.bar = None
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def kept_phase(self, name: str, steps: int, stem: str, settings: dict, **objects: Any) -> Iterator[int]:
        """`phase`, whose result serves every run in `out_dir` with these settings, this seed, this kind of device.

        It is read from <out_dir>/.<name>/<stem>-<key>.pt or else kept there, unless it came by --from-<name>; and
        exported as <name>.pt. `objects` are what it trains.
        """
        shaped = json.dumps([settings, self.args.seed, self.device.type])
        key = hashlib.sha256(shaped.encode()).hexdigest()[:16]
        path = Path(self.args.out_dir) / f".{name}" / f"{stem}-{key}.pt"
        if name not in self.done and path.exists():
            self.import_phase(name, path, settings, **objects)
        yield from self.phase(name, steps)
        if self.once(f"{name}_end"):
            state = self.export_phase(name, settings, **objects)
            if not getattr(self.args, f"from_{name}") and not path.exists():
                path.parent.mkdir(exist_ok=True)
                save_atomically(state, path)

    def _tick(self) -> None:
        """Add the wall time since the last call to the running phase."""
        if self.bar is not None:
            now = time.monotonic()
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self._started
            self._started = now

    # -- progress --

    def _title(self) -> str:
        """The running phase: "1/2 offline", or within which of the two it lies, "2/2 online, generator"."""
        over = self.done.get("offline", 0) >= self.args.offline_steps
        of = self.current if self.current in MAIN else MAIN[over]
        title = f"{MAIN.index(of) + 1}/{1 + (self.args.online_steps > 0)} {of}"
        return title if of == self.current else f"{title}, {self.current}"

    def _left(self) -> float | None:
        """Seconds to the end of the run at the pace so far, which offline stands for online's; None if unknown."""
        each, left = None, 0.0  # seconds of a step, and what lies between two of them
        done, now = self.done[self.current], sum(self.seconds.values())
        if self.current not in MAIN:
            left = (self.bar.total - done) * self.seconds[self.current] / max(done, 1)
        for phase in MAIN:
            steps, done = getattr(self.args, f"{phase}_steps"), self.done.get(phase, 0)
            if done and phase in self.starts:
                until = self.starts["online"] if phase == "offline" and "online" in self.starts else now
                each = (until - self.starts[phase]) / done
            if done < steps and each is None:
                return None
            left += (steps - done) * each if done < steps else 0.0
        return left

    def _tell(self) -> None:
        """Score, speed and time left: to the bar, and to progress.json for whoever watches."""
        self._tick()
        self.told_at, done = time.monotonic(), self.done[self.current]
        scores = [x for phase in MAIN for x in self.scores.get(phase, ())]
        score, left = scores[-1] if scores else None, self._left()
        told = [f"score {score:.1f}"] if scores else []
        told += [f"run ends in {timedelta(seconds=round(left))}"] if left is not None else []
        self.bar.set_postfix_str(", ".join(told))
        speed = done / self.seconds[self.current] if self.seconds.get(self.current) else None
        of = {"phase": self._title(), "step": done, "steps": self.bar.total, "per_s": speed}
        write_json(of | {"left_s": left, "score": score}, self.dir / "progress.json")

    # -- log --

    def log(self, step: int, metrics: dict[str, torch.Tensor]) -> None:
        """Add a line to the log at every LOG_EVERY-th step; the one place where losses come to the host.

        Raises FloatingPointError when a loss is not finite.
        """
        if (step + 1) % LOG_EVERY:
            return
        names = [k for k, v in metrics.items() if isinstance(v, torch.Tensor)]
        values = torch.stack([metrics[k].float() for k in names]).tolist() if names else []  # one copy
        read = dict(zip(names, values, strict=True))
        if broken := [k for k, v in read.items() if k.startswith("loss/") and not math.isfinite(v)]:
            raise FloatingPointError(f"{', '.join(broken)} not finite at {self.current} step {step + 1}")
        now = time.monotonic()
        speed = (step + 1 - self.clock[1]) / max(now - self.clock[0], 1e-9)
        self.clock = (now, step + 1)
        self.record(step + 1, {**metrics, **read, f"time/{self.current}_steps_per_s": speed})

    def record(self, step: int, row: dict[str, float]) -> None:
        """Add a line to the log now. `eval/score` also goes to the scores, the bar and the screen."""
        self.rows.append({"phase": self.current, "step": step, **row})
        if "eval/score" in row:
            self.scores.setdefault(self.current, []).append(row["eval/score"])
            score, result = row["eval/score"], row["eval/return"]
            tqdm.write(f"{self.current} {step}: score {score:.1f}, return {result:.1f}")
            if self.bar is not None:
                self._tell()
            self._write_rows()
            self.clock = (time.monotonic(), step)  # evaluations do not count as speed
            self.saved_at = -math.inf  # a checkpoint is due
        if self.wandb is not None:
            self.wandb.log({**row, f"{self.current}_step": step})
        if self.args.tensorboard:
            board = self._board()
            for k, v in row.items():
                board.add_scalar(k, v, step)
            board.flush()

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(k for row in self.rows for k in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(text.getvalue().encode(), self.dir / "log.csv")

    def _load_rows(self, count: int) -> None:
        if count and (self.dir / "log.csv").exists():
            with open(self.dir / "log.csv", newline="") as f:
                rows = list(csv.DictReader(f))[:count]
            self.rows = [{k: v for k, v in row.items() if v != ""} for row in rows]

    def _board(self) -> Any:
        """TensorBoard's writer of the running phase; what is behind the checkpoint of a resumed run is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        if self.current not in self.boards:
            folder, first = self.dir / "tensorboard" / self.current, self.done.get(self.current, 0)
            self.boards[self.current] = SummaryWriter(folder, purge_step=first + 1)
        return self.boards[self.current]

    def _start_wandb(self) -> None:
        try:
            import wandb

            file, task, seed = self.dir.parts[-3:]
            same = dict(group=f"{file} {task}", name=seed, id=re.sub(r"\W", "-", f"{file}/{task}/{seed}"))
            config = asdict(self.args)
            self.wandb = wandb.init(project="o2o-diffusion", config=config, resume="allow", **same)
        except Exception as e:  # a logging service must never stop a run
            print(f"warning: going on without Weights & Biases: {e}", file=sys.stderr)

    def finish(self) -> dict[str, float]:
        """Write and return final.json: scores, seconds per phase, memory."""
        online = self.scores.get("online", [])
        result = {
            "offline_score": self.scores["offline"][-1],
            "final_score": (online or self.scores["offline"])[-1],
            "score_last4": float(np.mean((online or self.scores["offline"])[-4:])),
            "score_online_mean": float(np.mean(online or self.scores["offline"][-1:])),
            **{f"{k}_seconds": round(v, 1) for k, v in self.seconds.items()},
            "peak_memory_gib": round(peak_memory(self.device, self.memory), 2),
        }
        self._write_rows()
        write_json(result, self.dir / "final.json")
        (self.dir / "progress.json").unlink(missing_ok=True)
        print(f"{self.dir}: " + ", ".join(f"{k} {v:.1f}" for k, v in result.items()))
        if self.wandb is not None:
            self.wandb.finish()
        for board in self.boards.values():
            board.close()
        self.release()
        return result

    # -- speed --

    def compiled(self, function: Callable) -> Callable:
        """`function` through torch.compile with --compile, else as it is. For losses: tensors in and out."""
        if self.compile and not any(map(shutil.which, ("cc", "gcc", "clang"))):
            print("note: no C compiler, so losses are not compiled", file=sys.stderr)
            return function
        return torch.compile(function) if self.compile else function

    def capture(self, step: Callable[[], dict[str, torch.Tensor]]) -> Callable[[], dict[str, torch.Tensor]]:
        """`step` (no arguments, static tensors, no host sync): a CUDA graph on a GPU with --compile, else itself."""
        return CapturedStep(step) if self.compile and self.device.type == "cuda" else step


class CapturedStep:
    """A gradient step as a CUDA graph: a few ordinary calls first (they count as training), then replays."""

    WARMUP = 3  # gradients, optimizer state and library workspaces must exist before the capture

    def __init__(self, step: Callable[[], dict[str, torch.Tensor]]):
        self.step, self.calls, self.graph, self.out = step, 0, None, {}

    def __call__(self) -> dict[str, torch.Tensor]:
        if self.calls < self.WARMUP:
            self.calls += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.out = self.step()
            torch.cuda.current_stream().wait_stream(stream)
            return self.out
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.step()
        self.graph.replay()
        return self.out


def restore(obj: Any, state: Any) -> None:
    """Load `state` into `obj`. An optimizer keeps its own fused and capturable flags, not the checkpoint's."""
    if isinstance(obj, torch.Tensor):
        obj.copy_(state)
    elif isinstance(obj, torch.optim.Optimizer):
        keep = [{k: g[k] for k in ("fused", "capturable", "foreach")} for g in obj.param_groups]
        rates = [g["lr"] for g in obj.param_groups]
        obj.load_state_dict(state)
        for group, flags, lr in zip(obj.param_groups, keep, rates, strict=True):
            if isinstance(lr, torch.Tensor):  # the tensor that the step writes the schedule into
                group["lr"] = lr.copy_(group["lr"])
            group.update(flags)
    else:
        obj.load_state_dict(state)
