"""Runs as a user has them: resume after any death, signals, refusals in one line, full disks, presets."""

import csv
import errno
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FILES, ROOT, TINY, Killed, kill_after, module, tiny_args

from algorithms import iql
from common import buffer, data, run

UNTIMED = ("offline_score", "final_score", "score_last4")


def results(folder: Path) -> tuple[dict, list[dict]]:
    """final.json without times, log.csv without times."""
    final = json.loads((folder / "final.json").read_text())
    with open(folder / "log.csv", newline="") as f:
        rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(f)]
    return {k: final[k] for k in UNTIMED}, rows


def run_dir(out: Path, stem: str, dataset: Path) -> Path:
    return out / stem / f"hopper-medium-v2@{dataset.stem}" / "seed0"


@pytest.mark.parametrize("stem", FILES)
def test_a_killed_run_resumes_to_the_same_result(stem, dataset, tmp_path, monkeypatch):
    """Die in the middle of a gradient step, in every phase, again and again; checkpoints come at random moments."""
    straight = tiny_args(stem, dataset=dataset, out_dir=tmp_path / "straight")
    module(stem).train(straight)
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.05)
    args = tiny_args(stem, dataset=dataset, out_dir=tmp_path / "killed")
    deaths = 0
    for life in range(20):
        with monkeypatch.context() as patch:
            kill_after(patch, buffer.ReplayBuffer, "draw", 7 + 5 * life)
            try:
                module(stem).train(args)
                break
            except Killed:
                deaths += 1
        gc.collect()  # the lock goes with the process; here with the object
    assert deaths >= 3
    killed, whole = (results(run_dir(tmp_path / x, stem, dataset)) for x in ("killed", "straight"))
    assert killed == whole


def command(stem: str, dataset: Path, out: Path, **changes) -> list[str]:
    known = module(stem).Args.__dataclass_fields__
    settings = {k: v for k, v in TINY.items() if k in known} | changes
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    script = ROOT / "algorithms" / f"{stem}.py"
    where = [f"--dataset={dataset}", f"--out-dir={out}", "--env=hopper-medium-v2"]
    return [sys.executable, str(script), *where, *flags]


@pytest.mark.parametrize(("phase", "sent", "code"), [("offline", "SIGINT", 130), ("online", "SIGTERM", 143)])
def test_signals_write_a_checkpoint_and_the_same_command_goes_on(phase, sent, code, dataset, tmp_path):
    """From another working directory, by path: also shows that the import path does not matter."""
    long = dict(offline_steps=800, online_steps=900, eval_every=300)
    argv = command("iql", dataset, tmp_path, **long)
    folder = run_dir(tmp_path, "iql", dataset)
    process = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    ready = folder / ("args.json" if phase == "offline" else "policy.pt2")
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(getattr(signal, sent))
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "checkpoint written" in err
    state = torch.load(folder / "state.pt", weights_only=True)
    assert 0 < state["done"][phase] < long[f"{phase}_steps"]
    again = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "resumed at" in again.stdout
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path / "straight", **long))
    assert results(folder)[0] == results(run_dir(tmp_path / "straight", "iql", dataset))[0]


def test_a_finished_run_says_so_and_overwrite_starts_anew(dataset, tmp_path, capsys):
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path)
    first = module("iql").train(args)
    stamp = (run_dir(tmp_path, "iql", dataset) / "state.pt").stat().st_mtime_ns
    assert module("iql").train(args) == first
    assert "finished" in capsys.readouterr().out
    assert (run_dir(tmp_path, "iql", dataset) / "state.pt").stat().st_mtime_ns == stamp
    again = module("iql").train(
        tiny_args("iql", dataset=dataset, out_dir=tmp_path, overwrite=True, polyak=0.5)
    )
    assert (run_dir(tmp_path, "iql", dataset) / "state.pt").stat().st_mtime_ns > stamp
    assert set(again) == set(first)


def test_overwrite_removes_nothing_before_the_command_is_valid(dataset, tmp_path):
    """A path that is not there, the run's own folder, another's of other settings, a batch without rows: it stays."""
    other = tmp_path / "other"
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=other, online_steps=0, gamma=0.5))
    first = module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path))
    folder = run_dir(tmp_path, "iql", dataset)
    for changes, words in (
        (dict(from_offline=tmp_path / "typo"), "--from-offline: got .*typo"),
        (dict(from_offline=folder), "--from-offline: got .*--overwrite removes this one"),
        (dict(from_offline=folder / "offline.pt"), "--from-offline: got .*--overwrite removes this one"),
        (dict(from_offline=run_dir(other, "iql", dataset)), "--from-offline: got gamma 0.5 -> 0.99"),
        (dict(offline_frac=0.01), "rows of a batch"),
    ):
        with pytest.raises(run.UsageError, match=words):
            module("iql").train(
                tiny_args("iql", dataset=dataset, out_dir=tmp_path, overwrite=True, **changes)
            )
        assert module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path)) == first


def test_resuming_with_other_code_is_said(dataset, tmp_path, capsys, monkeypatch):
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path)
    first = module("iql").train(args)
    monkeypatch.setattr(run, "git_commit", lambda: "another")
    module("iql").train(args)
    assert not capsys.readouterr().err  # finished: nothing is computed
    (run_dir(tmp_path, "iql", dataset) / "final.json").unlink()
    assert module("iql").train(args)["final_score"] == first["final_score"]
    assert re.search(r"note: .* was begun with other code: commit \S+ -> another\n", capsys.readouterr().err)


def test_other_settings_are_refused_by_name_and_other_data_too(dataset, tmp_path):
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path))
    with pytest.raises(run.UsageError, match=r"gamma 0\.99 -> 0\.5, utd 1 -> 3"):
        module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path, utd=3, gamma=0.5))
    other = tmp_path / dataset.name
    other.write_bytes(dataset.read_bytes() + b"\0")
    with pytest.raises(
        run.UsageError, match="as when the run was started"
    ):  # finished, but not on these data
        module("iql").train(tiny_args("iql", dataset=other, out_dir=tmp_path))
    (run_dir(tmp_path, "iql", dataset) / "final.json").unlink()
    with pytest.raises(run.UsageError, match="as when the run was started"):
        module("iql").train(tiny_args("iql", dataset=other, out_dir=tmp_path))


def test_two_processes_cannot_share_a_run_directory(dataset, tmp_path):
    """Not even with --overwrite, which removes nothing before it has the directory for itself."""
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path, overwrite=True)
    first = run.Run(args, "iql.py", "somewhere", {})
    first.register()
    assert not list(first.phase("offline", 0))  # what was there is gone now
    with pytest.raises(run.UsageError, match="no other process"):
        run.Run(args, "iql.py", "somewhere", {})
    assert (first.dir / "args.json").exists()
    del first
    run.Run(args, "iql.py", "somewhere", {})


def test_seeds_change_the_run_and_equal_seeds_repeat_it(dataset, tmp_path):
    def rows(seed: int, out: str) -> list[dict]:
        module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path / out, seed=seed))
        return results(run_dir(tmp_path / out, "iql", dataset).with_name(f"seed{seed}"))[1]

    assert rows(0, "a") == rows(0, "b")
    assert rows(0, "a") != rows(1, "a")


# ---- refusals: one line on stderr, exit 2, no traceback, nothing left behind ----


def refused(argv: list[str], monkeypatch, capsys, stem: str = "iql") -> str:
    """Run main in this process; return its one line on stderr."""
    monkeypatch.setattr(sys, "argv", [f"{stem}.py", *argv])
    with pytest.raises(SystemExit) as e:
        run.main(module(stem).train, module(stem).Args, module(stem).ENV_PRESETS)
    err = capsys.readouterr().err
    assert e.value.code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    del e
    gc.collect()  # the lock of a run that failed goes with its object
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--env", "hoper-medium-v2"], ["--env", "hoper-medium-v2", "hopper-medium-v2", "hopper-mini-v0"]),
        (["--expectil", "0.8"], ["--expectil"]),
        (["--batch-size", "many"], ["--batch-size", "many"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--expectile", "1.5"], ["--expectile", "1.5", "(0, 1)"]),
        (["--gamma", "nan"], ["--gamma", "nan", "[0, 1]"]),
        (["--lr", "-1"], ["--lr", "-1", "(0, inf)"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--utd", "0"], ["--utd", "0", "[1, inf)"]),
        (["--eval-episodes", "0"], ["--eval-episodes", "[1, inf)"]),
        (["--offline-frac", "0.001"], ["--offline-frac", "0.001", "256"]),
        (
            ["--batch-size", "2", "--offline-frac", "0.1"],
            ["0 dataset, 2 own", "--batch-size 2", "--offline-frac 0.1"],
        ),
        (["--warmup-steps", "9", "--online-steps", "9"], ["--warmup-steps", "9"]),
        (["--append-online", "--offline-frac", "0.2"], ["--offline-frac", "0.2", "not append_online"]),
        (["--env", "hopper-mini-v0-gravity-999999"], ["--env", "hopper-mini-v0-gravity-999999", "up to 100"]),
        (["--dataset", "no/such/file.hdf5"], ["--dataset", "no/such/file.hdf5"]),
    ],
)
def test_bad_usage_is_one_line(argv, words, monkeypatch, capsys, tmp_path):
    if "--env" not in argv:
        argv = ["--env", "hopper-mini-v0", *argv]
    line = refused([*argv, "--out-dir", str(tmp_path)], monkeypatch, capsys)
    assert all(w in line for w in words), line


def test_a_divergence_is_one_line_and_keeps_the_last_finite_checkpoint(
    dataset, monkeypatch, capsys, tmp_path
):
    """Exit 1: what broke, the step, the likely flag; the checkpoint before it is finite, and resumes to the same."""
    sizes = dict(offline_steps=40, online_steps=20, warmup_steps=5, batch_size=16, hidden=16, eval_every=10)
    flags = [f"{run.flag(k)}={v}" for k, v in sizes.items()]
    where = [f"--dataset={dataset}", f"--out-dir={tmp_path}", "--env=hopper-medium-v2"]
    argv = ["iql.py", *where, "--device=cpu", *flags]
    original = iql.losses

    def broken(nets, batch, args):
        loss, logs = original(nets, batch, args)
        broken.calls += 1
        return (loss * float("nan"), logs) if broken.calls == 23 else (loss, logs)

    monkeypatch.setattr(iql, "losses", broken)
    monkeypatch.setattr(sys, "argv", [*argv, "--lr=0.5"])
    for _ in range(2):  # and again from the checkpoint
        broken.calls = 0 if not (tmp_path / "iql").exists() else 20
        with pytest.raises(SystemExit) as e:
            run.main(iql.train, iql.Args, iql.ENV_PRESETS)
        err = capsys.readouterr().err
        assert e.value.code == 1 and err.count("\n") == 1, err
        assert err.startswith("error: ") and "likely: --lr 0.5" in err, err
        assert "not finite at offline step 25" in err, err
        del e
        gc.collect()
        (path,) = tmp_path.glob("iql/*/seed0/state.pt")
        state = torch.load(path, weights_only=True)
        assert state["done"]["offline"] == 20
        assert all(x.isfinite().all() for x in state["objects"]["nets"].values())


def test_networks_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path):
    net = torch.nn.Linear(2, 2)
    r = run.Run(tiny_args("iql", out_dir=tmp_path), "iql.py", "x", {})
    r.register(net=net)
    for step in r.phase("offline", 3):
        if step == 1:
            r.checkpoint()
            before = (r.dir / "state.pt").read_bytes()
            net.weight.data[0, 0] = math.inf
            with pytest.raises(FloatingPointError, match="net not finite at offline step 1"):
                r.checkpoint()
            assert (r.dir / "state.pt").read_bytes() == before
            break


def test_likely_causes_are_the_flags_or_the_learning_rates():
    args = module("synther").Args(env="hopper-medium-v2", diffusion_lr=1e6, utd=3)
    assert run.suspects(args, {}) == "likely: --diffusion-lr 1e+06"
    plain = module("synther").Args(env="hopper-medium-v2")
    assert run.suspects(plain, {}) == "likely: --policy-lr 0.0001, --critic-lr 0.0003, --diffusion-lr 0.0003"


def test_cuda_without_a_gpu_is_refused(monkeypatch, capsys, tmp_path):
    def no_gpu(*_, **__):
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch, "zeros", no_gpu)
    argv = ["--env", "hopper-mini-v0", "--device", "cuda", "--out-dir", str(tmp_path)]
    line = refused(argv, monkeypatch, capsys)
    assert "--device" in line and "cpu" in line


def test_no_network_says_where_the_file_goes(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("D4RL_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    argv = ["--env", "hopper-medium-v2", "--out-dir", str(tmp_path / "runs")]
    line = refused(argv, monkeypatch, capsys, "iql_dare")
    assert "http://127.0.0.1:9/gym_mujoco_v2/hopper_medium-v2.hdf5" in line
    assert str(tmp_path / "data" / "hopper_medium-v2.hdf5") in line and "hopper-mini-v0" in line
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {".lock"}


def test_corrupt_dataset_and_corrupt_checkpoint_are_refused(dataset, monkeypatch, capsys, tmp_path):
    bad = tmp_path / "bad.hdf5"
    bad.write_bytes(dataset.read_bytes()[:5000])
    argv = ["--env=hopper-medium-v2", f"--dataset={bad}", f"--out-dir={tmp_path}"]
    assert str(bad) in refused(argv, monkeypatch, capsys)
    out = tmp_path / "runs"
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=out))
    folder = run_dir(out, "iql", dataset)
    (folder / "final.json").unlink()
    (folder / "state.pt").write_bytes(b"not a checkpoint")
    line = refused(command("iql", dataset, out)[2:], monkeypatch, capsys)
    assert "state.pt" in line
    (folder / "args.json").write_text("{")
    assert "args.json" in refused(command("iql", dataset, out)[2:], monkeypatch, capsys)


def test_a_checkpoint_of_another_version_is_refused(dataset, monkeypatch, capsys, tmp_path):
    """One object more than the checkpoint has; another width of a network."""
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path))
    folder = run_dir(tmp_path, "iql", dataset)
    (folder / "final.json").unlink()
    state = torch.load(folder / "state.pt", weights_only=True)
    for change in (
        lambda s: s["objects"].pop("updates"),
        lambda s: s["objects"]["nets"].pop("actor.log_std"),
    ):
        older = dict(state, objects=dict(state["objects"], nets=dict(state["objects"]["nets"])))
        change(older)
        torch.save(older, folder / "state.pt")
        line = refused(command("iql", dataset, tmp_path)[2:], monkeypatch, capsys)
        assert "this version" in line


@pytest.mark.parametrize("write", [1, 4, 9, 14])
def test_full_disk_keeps_the_earlier_checkpoint(write, dataset, monkeypatch, capsys, tmp_path):
    """The disk is full at some write: exit 1, one line, nothing half-written; with room again the run goes on."""
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path / "straight"))
    fsync, calls = os.fsync, [0]

    def full(fd: int) -> None:
        calls[0] += 1
        if calls[0] == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "runs"
    argv = command("iql", dataset, out)[2:]
    monkeypatch.setattr(sys, "argv", ["iql.py", *argv])
    with pytest.raises(SystemExit) as e:
        run.main(module("iql").train, module("iql").Args, module("iql").ENV_PRESETS)
    err = capsys.readouterr().err
    assert e.value.code == 1 and err.count("\n") == 1 and "No space left" in err, err
    folder = run_dir(out, "iql", dataset)
    assert not list(folder.glob("*.part")) and not (folder / "final.json").exists()
    del e
    gc.collect()
    run.main(module("iql").train, module("iql").Args, module("iql").ENV_PRESETS)
    assert results(folder) == results(run_dir(tmp_path / "straight", "iql", dataset))


# ---- settings ----


def parsed(stem: str, argv: list[str], monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{stem}.py", *argv])
    return run.parse_args(module(stem).Args, module(stem).ENV_PRESETS)


def test_a_signal_while_flags_are_read_is_no_bad_flag(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["iql.py"])
    monkeypatch.setattr(run.tyro, "cli", lambda *_, **__: sys.exit(143))  # what the handler of SIGTERM does
    with pytest.raises(SystemExit, match="143"):
        run.parse_args(iql.Args, iql.ENV_PRESETS)
    assert capsys.readouterr().err == ""


def test_class_default_then_preset_then_flag(monkeypatch, tmp_path):
    """A flag equal to the class default still wins over the preset; args.json tells the origin of each."""
    preset = module("iql").ENV_PRESETS["hopper-mini"]
    argv = ["--env", "hopper-mini-v0", "--hidden", "256", "--out-dir", str(tmp_path)]
    args = parsed("iql", argv, monkeypatch)
    assert preset["hidden"] != 256 == args.hidden
    assert args.online_steps == preset["online_steps"] and args.gamma == 0.99
    r = run.Run(args, "iql.py", "x", module("iql").ENV_PRESETS)
    r.register()
    settings = json.loads((r.dir / "args.json").read_text())["settings"]
    origins = {k: settings[k]["origin"] for k in ("hidden", "online_steps", "gamma", "env")}
    assert origins == {"hidden": "flag", "online_steps": "preset", "gamma": "default", "env": "flag"}


def test_later_presets_win_and_full_names_do_not_spread(monkeypatch):
    for env, scale in [("hopper-medium-v2", 8), ("hopper-medium-replay-v2", 3), ("hopper-random-v2", 3)]:
        assert parsed("iql_dare", ["--env", env], monkeypatch).guidance_scale == scale
    assert parsed("iql_dare", ["--env", "walker2d-medium-expert-v2"], monkeypatch).guidance_scale == 5


@pytest.mark.parametrize(("flag", "value"), [("--compile", True), ("--no-compile", False), (None, None)])
def test_compile_flag(flag, value, monkeypatch):
    assert parsed("iql", [flag] if flag else [], monkeypatch).compile is value


def test_from_offline_takes_the_networks_and_refuses_other_settings(dataset, tmp_path):
    """The offline score is the first run's; gradient steps offline are not repeated; a changed setting is named."""
    first = module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path))
    source = run_dir(tmp_path, "iql", dataset)
    second = module("iql_dare").train(
        tiny_args("iql_dare", dataset=dataset, out_dir=tmp_path, from_offline=source)
    )
    assert second["offline_score"] == first["offline_score"]
    assert "offline_seconds" not in second
    paths = (run_dir(tmp_path, stem, dataset) / "offline.pt" for stem in ("iql", "iql_dare"))
    theirs, ours = (torch.load(path, weights_only=True) for path in paths)
    for k, v in theirs["objects"]["nets"].items():
        assert torch.equal(v, ours["objects"]["nets"][k])
    out = tmp_path / "other"
    with pytest.raises(run.UsageError, match=r"expectile 0.7 -> 0.9"):
        args = tiny_args("iql_dare", dataset=dataset, out_dir=out, from_offline=source, expectile=0.9)
        module("iql_dare").train(args)
    with pytest.raises(run.UsageError, match="offline phase is over"):
        module("iql").train(tiny_args("iql", dataset=dataset, out_dir=out, from_offline=tmp_path / "nowhere"))


def test_wandb_that_fails_does_not_stop_the_run(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path, wandb=True))
    assert "going on without" in capsys.readouterr().err


def test_wandb_gets_the_log(dataset, tmp_path, monkeypatch):
    class Fake:
        def init(self, **settings):
            self.settings, self.rows = settings, []
            return self

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            self.rows.append("finished")

    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    result = module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path, wandb=True))
    assert fake.settings["config"]["hidden"] == TINY["hidden"]
    assert fake.rows[-1] == "finished" and fake.rows[-2]["eval/score"] == result["final_score"]


def test_a_machine_without_posix_modules_trains(dataset, tmp_path):
    """As on Windows: no fcntl, resource, sysconf. The lock is another, memory is not known, all else is the same."""
    code = """
import os, sys
del os.sysconf
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.path.insert(0, sys.argv[1])
from conftest import *
args = tiny_args("iql", dataset=Path(sys.argv[2]), out_dir=Path("runs"))
with run.lock_of(Path(".")).acquire(blocking=False), pytest.raises(run.Timeout):
    run.lock_of(Path(".")).acquire(blocking=False)
result = module("iql").train(args)
assert result["peak_memory_gib"] == 0.0 and module("iql").train(args) == result
"""
    script = [sys.executable, "-c", code, ROOT / "tests", dataset]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-2_000:]
    here = module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path / "here"))
    there = json.loads(next(tmp_path.glob("runs/**/final.json")).read_text())
    assert {k: here[k] for k in UNTIMED} == {k: there[k] for k in UNTIMED}


def test_results_are_what_the_log_says(dataset, tmp_path):
    """offline_score, final_score, score_last4 recomputed from log.csv; raw returns give the scores."""
    final = module("iql").train(
        tiny_args("iql", dataset=dataset, out_dir=tmp_path, online_steps=60, eval_every=10)
    )
    _, rows = results(run_dir(tmp_path, "iql", dataset))
    told = [x for x in rows if x["eval/score"]]
    scores = {p: [float(x["eval/score"]) for x in told if x["phase"] == p] for p in ("offline", "online")}
    assert [x["step"] for x in told if x["phase"] == "online"] == ["10", "20", "30", "40", "50", "60"]
    assert final["offline_score"] == pytest.approx(scores["offline"][-1])
    assert final["final_score"] == pytest.approx(scores["online"][-1])
    assert final["score_last4"] == pytest.approx(sum(scores["online"][-4:]) / 4)
    raw = float(rows[-1]["eval/return"])
    assert final["final_score"] == pytest.approx(100 * (raw + 20.272305) / (3234.3 + 20.272305))
    assert data.TASKS["hopper-medium-v2"].ref_max == 3234.3


def test_peak_memory_is_that_of_the_process_and_survives_a_resume(dataset, tmp_path, monkeypatch):
    """A tensor of 200 MB on the way is seen; a resumed run remembers what the one before needed."""
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path)
    before = run.peak_memory(torch.device("cpu"))
    torch.ones(25_000_000, dtype=torch.float64)
    after = run.peak_memory(torch.device("cpu"))
    assert 0 < before <= after < 64 and run.peak_memory(torch.device("cpu"), 99.0) == 99.0
    with monkeypatch.context() as m:
        m.setattr(run, "peak_memory", lambda _, known=0.0: max(known, 123.456))
        m.setattr(run.Run, "finish", lambda _: sys.exit(0))
        with pytest.raises(SystemExit):
            module("iql").train(args)
    assert module("iql").train(args)["peak_memory_gib"] == 123.46


def test_a_checkpoint_without_peak_memory_is_taken_up(dataset, tmp_path, monkeypatch):
    """As versions before that figure wrote them: the run goes on to the same scores."""
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path / "a")
    straight = module("iql").train(args)
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path / "b")
    with monkeypatch.context() as m:
        m.setattr(run.Run, "finish", lambda _: sys.exit(0))
        with pytest.raises(SystemExit):
            module("iql").train(args)
    path = run_dir(tmp_path / "b", "iql", dataset) / "state.pt"
    state = torch.load(path, weights_only=False)
    assert state.pop("memory") > 0
    torch.save(state, path)
    resumed = module("iql").train(args)
    assert {k: resumed[k] for k in UNTIMED} == {k: straight[k] for k in UNTIMED}
    assert resumed["peak_memory_gib"] > 0


@pytest.mark.parametrize("capability", [None, "AVX2", "AVX512"])
def test_cpu_matmul_stays_float32(capability, monkeypatch):
    """Whatever the machine, at the sizes of a critic and beyond; the global setting is left as it was."""
    if capability:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    run.cpu_matmul.cache_clear()
    before = torch.get_float32_matmul_precision()
    chosen = run.cpu_matmul()
    assert torch.get_float32_matmul_precision() == before
    assert chosen == "highest" or capability != "AVX2"
    try:
        torch.set_float32_matmul_precision(chosen)
        for rows in (256, 8_000):
            x, y = torch.randn(2, rows, 256), torch.randn(2, 256, 256) / 16
            assert (x @ y - (x.double() @ y.double())).abs().max() < 1e-4  # bfloat16: 1e-2
    finally:
        torch.set_float32_matmul_precision(before)
        run.cpu_matmul.cache_clear()


def test_restore_keeps_an_optimizers_flags_and_its_learning_rate_tensor():
    """torch's load_state_dict would bring back the checkpoint's fused/capturable flags and another tensor."""
    p = torch.nn.Parameter(torch.ones(2))
    lr = torch.tensor(0.5)
    fused = torch.optim.Adam([{"params": [p], "lr": lr}], fused=True)
    plain = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.25)
    run.restore(fused, plain.state_dict())
    assert fused.param_groups[0]["fused"] is True
    assert fused.param_groups[0]["lr"] is lr and lr.item() == 0.25
