"""Following a run: the bar, progress.json, the table of unfinished runs, TensorBoard, Weights & Biases."""

import json
import math
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import HOPPER, ROOT, Killed, kill_after, log_rows, module, tiny_args

from common import run
from common.tools import report, watch


def told(folder) -> dict:
    (path,) = folder.glob("**/progress.json")
    return json.loads(path.read_text())


def pace(monkeypatch, seconds_of: dict[str, float]) -> list[dict]:
    """Steps last as many seconds as their phase says; what is told at each of them, phase and step included."""
    found, tell = [], run.Run._tell

    def ticking(r: run.Run) -> None:
        if r.bar is not None:
            counted = r.__dict__.setdefault("counted", {})
            steps = r.done[r.current] - counted.setdefault(
                r.current, r.bar.n
            )  # n: where the phase began, no terminal
            counted[r.current] += steps
            r.seconds[r.current] = r.seconds.get(r.current, 0.0) + seconds_of[r.current] * steps

    def telling(r: run.Run) -> None:
        tell(r)
        found.append(told(r.dir) | {"bar": r.bar.postfix})

    monkeypatch.setattr(run.Run, "_tick", ticking)
    monkeypatch.setattr(run.Run, "_tell", telling)
    monkeypatch.setattr(run, "TELL_SECONDS", -1.0)  # at every step
    return found


def test_the_time_left_is_that_of_the_whole_run(dataset, tmp_path, monkeypatch):
    """Steps of 2 s offline, of 3 s online: after 5 of 20 + 30 steps 15 * 2 + 30 * 2 s, after 20 + 10 20 * 3 s."""
    found = pace(monkeypatch, {"offline": 2.0, "online": 3.0})
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path))
    at = {(x["phase"], x["step"]): x for x in found}
    assert at["1/2 offline", 5]["left_s"] == 15 * 2 + 30 * 2 and at["1/2 offline", 5]["per_s"] == 0.5
    assert at["1/2 offline", 5]["score"] is None and at["1/2 offline", 5]["bar"] == "run ends in 0:01:30"
    assert at["2/2 online", 10]["left_s"] == 20 * 3 and at["2/2 online", 10]["steps"] == 30
    score = float(next(x["eval/score"] for x in log_rows(tmp_path) if x["step"] == "20" and x["eval/score"]))
    assert at["2/2 online", 10]["score"] == pytest.approx(score)
    assert at["2/2 online", 10]["bar"] == f"score {score:.1f}, run ends in 0:01:00"
    assert not [*tmp_path.glob("**/progress.json")], "a finished run has none"


def test_phases_within_the_online_one_count_for_its_pace(dataset, tmp_path, monkeypatch):
    """iql_cfdg trains its generator first after 10 of 30 steps of 1 s: 15 steps of 10 s, then 2 chunks of 4 s."""
    found = pace(monkeypatch, {"offline": 1.0, "online": 1.0, "generator": 10.0, "sampling": 4.0})
    module("iql_cfdg").train(tiny_args("iql_cfdg", dataset=dataset, out_dir=tmp_path))
    during = [x for x in found if x["phase"] == "2/2 online, generator"]
    assert (during[4]["step"], during[4]["steps"]) == (5, 15)
    assert (
        during[4]["left_s"] == 10 * 10 + 20 * (10 + 50) / 10
    )  # the rest of this training, then as up to now
    after = next(x for x in found if x["phase"] == "2/2 online" and x["step"] == 11)
    assert after["left_s"] == pytest.approx(19 * (11 + 150 + 2 * 4) / 11)


def test_a_resumed_run_remembers_its_pace(dataset, tmp_path, monkeypatch):
    """Killed online: the folder tells how far it was; from the checkpoint on, the end is as far as without the kill."""
    found = pace(monkeypatch, {"offline": 2.0, "online": 3.0})
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path)
    with monkeypatch.context() as m:
        kill_after(m, run.Run, "log", 20 + 8)  # online, 10 steps of warm-up are not logged
        with pytest.raises(Killed):
            module("iql").train(args)
    assert watch.line(next(tmp_path.glob("*/*/seed0")))[1:4] == ("stopped", "2/2 online", "18 of 30")
    before = len(found)
    module("iql").train(args)
    again = found[before:]
    assert again[0]["step"] > 1 and again[-1]["step"] == 30
    assert all(x["left_s"] == (30 - x["step"]) * 3 for x in again)


# ---- the table ----


def test_unfinished_runs_are_shown_and_finished_ones_are_not(dataset, tmp_path, monkeypatch, capsys):
    module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path))
    assert watch.table(tmp_path) == ""
    with monkeypatch.context() as m:
        kill_after(m, run.Run, "finish", 0)
        with pytest.raises(Killed):
            module("pex").train(tiny_args("pex", dataset=dataset, out_dir=tmp_path))
    capsys.readouterr()
    report.main(report.Args(tmp_path))
    out = capsys.readouterr().out
    heading, row = out.split("\nUnfinished\n\n")[1].split("\n")[:2]
    assert heading.split()[:5] == ["run", "is", "phase", "step", "steps/s"]
    score = [x for x in log_rows(tmp_path / "pex") if x["eval/score"]][-1]["eval/score"]
    assert row.startswith(f"pex/{HOPPER}@{dataset.stem}/seed0  stopped  2/2 online  30 of 30")
    assert f"{float(score):.1f}" in row.split() and row.endswith("ago")


def test_a_running_process_is_told_from_a_dead_one(tmp_path):
    folder = tmp_path / "iql" / "task" / "seed0"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("{}")
    assert watch.line(folder)[1:3] == ("stopped", "begun")
    lock = run.lock_of(folder)
    with lock.acquire(blocking=False):
        other = "from pathlib import Path; from common.tools import watch; print(watch.running(Path('.')))"
        done = subprocess.run(
            [sys.executable, "-c", other], cwd=folder, capture_output=True, text=True, check=True
        )
        assert done.stdout == "True\n" and watch.line(folder)[1] == "running"
    assert watch.line(folder)[1] == "stopped"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"phase": "1/2 offline"}', '{"step": null}'])
def test_what_a_run_told_badly_is_a_question_mark(content, tmp_path):
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / "progress.json").write_text(content)
    assert watch.line(tmp_path)[2:] == ("begun", *"?????")


def test_watching_ends_with_the_last_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "args.json").write_text("{}")
    monkeypatch.setattr(watch.time, "sleep", lambda _: (tmp_path / "final.json").write_text("{}"))
    report.main(report.Args(tmp_path, watch=30.0))
    shown = capsys.readouterr().out
    assert shown.count("every 30 s") == 1 and shown.endswith("no unfinished run\n")
    for wrong in (dict(watch=0.0), dict(watch=math.nan), dict(watch=1.0, csv=tmp_path / "x.csv")):
        with pytest.raises(run.UsageError, match="--watch"):
            report.main(report.Args(tmp_path, **wrong))


# ---- TensorBoard, Weights & Biases ----


def scalars(folder, phase: str) -> dict[str, dict[int, float]]:
    """tag -> step -> value, as TensorBoard itself reads a phase's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.glob(f"**/tensorboard/{phase}")
    found = EventAccumulator(str(path)).Reload()
    return {tag: {x.step: x.value for x in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_has_the_log(dataset, tmp_path, monkeypatch):
    """Same keys, steps of each phase, same numbers; also of a run that was killed between two checkpoints."""
    args = tiny_args("iql", dataset=dataset, out_dir=tmp_path, tensorboard=True)
    with monkeypatch.context() as m:
        kill_after(m, run.Run, "log", 33)  # online, behind the checkpoint of step 15 or so
        with pytest.raises(Killed):
            module("iql").train(args)
    module("iql").train(args)
    rows = log_rows(tmp_path, times=True)
    for phase in ("offline", "online"):
        wanted = defaultdict(dict)
        for row in (x for x in rows if x["phase"] == phase):
            for k, v in row.items():
                if k not in ("phase", "step") and v != "":
                    wanted[k][int(row["step"])] = pytest.approx(float(v), rel=1e-6)
        assert scalars(tmp_path, phase) == wanted
    again = module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path, overwrite=True))
    assert math.isfinite(again["final_score"]) and not [*tmp_path.glob("**/tensorboard")]


def test_tensorboard_that_is_not_there_is_named(dataset, tmp_path, monkeypatch):
    find = run.importlib.util.find_spec
    monkeypatch.setattr(
        run.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(run.UsageError, match=r"--tensorboard: .* pip install tensorboard"):
        module("iql").train(tiny_args("iql", dataset=dataset, out_dir=tmp_path, tensorboard=True))


def test_wandb_offline_files_a_run_under_its_method_and_task(dataset, tmp_path):
    """The real package without a network: group, name, id; a resumed run is the same one."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import *
import wandb
init, told = wandb.init, []
def spy(**settings):
    told.append(init(**settings))
    return told[-1]
wandb.init = spy
args = tiny_args("iql", dataset=Path(sys.argv[2]), out_dir=Path("runs"), wandb=True)
with pytest.MonkeyPatch.context() as m:
    kill_after(m, run.Run, "finish", 0)
    try:
        module("iql").train(args)
    except Killed:
        told[-1].finish(exit_code=1)
module("iql").train(args)
print([(x.group, x.name, x.id, x.settings.mode) for x in told])
"""
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}
    script = [sys.executable, "-c", code, ROOT / "tests", dataset]
    done = subprocess.run(
        script, cwd=tmp_path, capture_output=True, text=True, env=dict(run.os.environ) | env
    )
    task = f"{HOPPER}@{dataset.stem}"
    same = (f"iql {task}", "seed0", run.re.sub(r"\W", "-", f"iql/{task}/seed0"), "offline")
    assert done.stdout.splitlines()[-1:] == [str([same, same])], done.stderr[-2_000:]
    assert len([*tmp_path.glob("wandb/offline-run-*")]) == 2
