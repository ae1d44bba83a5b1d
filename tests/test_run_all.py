"""run_all.sh: its list, what it passes to the programs, finished, failed, killed and parallel jobs.

Most tests have a stand-in for Python: it notes its arguments and leaves the files that a run leaves.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from conftest import FILES, ROOT, module

from common import data, run

SCRIPT = ROOT / "run_all.sh"
BACKBONES = {stem: "iql" if stem.startswith(("iql_", "pex")) else "calql" for stem in FILES}
BACKBONES |= {"dual": "iql", "dacer": "diffql"} | {
    stem: stem.split("_")[0]
    for stem in FILES
    if stem.startswith(("apl", "wsrl", "so2", "diffql", "diffuser"))
}
STAND_IN = """#!/usr/bin/env bash
here=${0%/*}
if [[ $1 == -c ]]; then cat "$here/gpu"; exit; fi
if [[ $1 == -m && $2 == *.ablations ]]; then cat "$here/ablations"; exit; fi
if [[ $1 == -m ]]; then echo "$*" >> "$here/kept"; exit; fi
stem=${1##*/} stem=${stem%.py} folder=$7/$stem/$3/seed$5
echo "$*" >> "$here/calls"
trap 'echo "$stem" >> "$here/stopped"; exit 143' TERM
read -r seconds < "$here/seconds"
[[ $seconds == 0 ]] || { sleep "$seconds" & wait $!; }
if [[ -f $here/broken && $stem == $(< "$here/broken") ]]; then echo "error: no such file"; exit 2; fi
mkdir -p "$folder"
echo > "$folder/offline.pt"
echo '{ "final_score": 12.5 }' > "$folder/final.json"
"""


class Bench:
    """run_all.sh with a stand-in for Python, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.program = folder / "python"
        self.program.write_text(STAND_IN)
        self.program.chmod(0o755)
        self.out = folder / "runs"
        self.set(gpu="True", seconds="0")

    def set(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(text + "\n")

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        keep = {k: v for k, v in os.environ.items() if k not in ("METHODS", "ENVS", "SEEDS", "JOBS", "EXTRA")}
        environment = keep | {"PYTHON": str(self.program), "OUT": str(self.out)} | variables
        pipe = subprocess.PIPE
        command = ["bash", str(SCRIPT), *words]
        # who runs the tests in the background has SIGINT ignored, which bash could not undo
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(
            command, env=environment, cwd=self.folder, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed
        )

    def __call__(self, *words: str, **variables: str) -> tuple[int, list[str], str]:
        """Exit code, lines of stdout, stderr."""
        process = self.start(*words, **variables)
        out, err = process.communicate(timeout=300)
        return process.returncode, out.splitlines(), err

    def read(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def called(self) -> Counter:
        """(file, task, seed) -> how often it was started."""
        words = [line.split() for line in self.read("calls")]
        return Counter((Path(w[0]).stem, w[2], w[4]) for w in words)

    def wait_for(self, name: str, lines: int) -> None:
        end = time.monotonic() + 30
        while len(self.read(name)) < lines:
            assert time.monotonic() < end, f"{name} has not {lines} lines"
            time.sleep(0.02)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def jobs_of(lines: list[str]) -> list[tuple[str, ...]]:
    """(method, task, seed) of the lines of --list."""
    return [tuple(shlex.split(line)[-3:]) for line in lines]


def offline_settings(stem: str, env: str) -> dict:
    file = module(stem)
    args = run.with_presets(file.Args, file.ENV_PRESETS, env)
    fixed = getattr(file, "PLAIN_CHAIN", {})  # of dacer.py: settings of its backbone that it does not have
    return {k: getattr(args, k) for k in file.OFFLINE_SETTINGS} | fixed


def test_the_full_list(bench):
    rc, lines, err = bench("--list")
    jobs = jobs_of(lines)
    tasks = {stem: {env for m, env, _ in jobs if m == stem} for stem in FILES}
    assert rc == 0 and not err and not bench.out.exists()
    assert {m for m, _, _ in jobs} == set(FILES)
    assert len(jobs) == len(set(jobs)) == 5 * sum(map(len, tasks.values()))
    assert {seed for _, _, seed in jobs} == set("01234")
    assert all(data.get_task(env).name == env for env in set.union(*tasks.values()))
    first = [m for m, _, _ in jobs]
    assert max(i for i, m in enumerate(first) if m in ("iql", "calql")) < first.index("iql_dare")
    alone = {"hopper-friction-2.0", "frozenlake-8x8"}  # no paper has IQL's own score there
    for stem, base in BACKBONES.items():
        assert tasks[stem] - alone <= tasks[base] or stem in ("iql", "calql")


def test_narrowing(bench):
    chosen = dict(METHODS="iql iql_dare", ENVS="hopper-medium-v2 walker2d-medium-v2", SEEDS="3 7 3")
    found = jobs_of(bench("--list", **chosen)[1])
    tasks = chosen["ENVS"].split()
    assert sorted(found) == sorted((m, e, s) for m in ("iql", "iql_dare") for e in tasks for s in "37")
    patterns = jobs_of(bench("--list", METHODS="*_dare dual", ENVS="hopper-*", SEEDS="0")[1])
    assert {m for m, _, _ in patterns} == {"iql_dare", "calql_dare", "dual"} and len(patterns) == 3 * 3 + 1
    methods = dict.fromkeys(method for method, *_ in jobs_of(bench("--list")[1]))  # in their order
    assert jobs_of(bench("--list", "--quick")[1]) == [(m, "hopper-mini-v0", "0") for m in methods]


def test_the_study_runs_what_is_not_kept_yet_and_keeps_each_result(bench):
    jobs = jobs_of(bench("--evidence", "--list", KEEP="none.csv")[1])
    embedded = ("hopper-mini-v0", "reacher-mini-v0")
    assert sorted(jobs) == sorted((m, e, str(s)) for m in FILES for e in embedded for s in range(10))
    kept = bench.folder / "kept.csv"
    kept.write_text("iql,reacher-mini-v0,0,abc,1.0,\niql,reacher-mini-v0,2,abc,,unfinished\n")
    some = dict(METHODS="iql", ENVS="reacher-mini-v0", SEEDS="0 1 2", KEEP=str(kept))
    rc, out, _ = bench("--evidence", **some)
    assert rc == 0 and "1 more are in" in out[0]
    assert sorted(seed for _, _, seed in bench.called()) == ["1", "2"]
    folders = [f"{bench.out}/iql/reacher-mini-v0/seed{seed}" for seed in (1, 2)]
    assert sorted(bench.read("kept")) == [f"-m common.tools.report {x} --keep {kept}" for x in folders]
    rc, out, _ = bench("--evidence", **some | {"SEEDS": "0"})
    assert (rc, out) == (0, [f"nothing left: 1 results are in {kept}"])
    # of a backbone that is kept, but whose checkpoint is gone, the new run is kept as well: it is the method's pair
    rc, _, _ = bench("--evidence", **some | {"SEEDS": "0", "METHODS": "iql_dare"})
    folders = [f"{bench.out}/{x}/reacher-mini-v0/seed0" for x in ("iql", "iql_dare")]
    assert bench.read("kept")[2:] == [f"-m common.tools.report {x} --keep {kept}" for x in folders]


def test_ablations_start_from_the_study_s_checkpoints_and_keep_their_results(bench):
    """Flags after all others; the whole method is run and kept with them where its run is not there."""
    bench.set(ablations="iql_cfdg\t--guidance-w 0\ndual\t--uq none")
    kept, some = bench.folder / "kept.csv", dict(SEEDS="0 1", METHODS="iql_cfdg dual")
    kept.write_text("iql_cfdg,reacher-mini-v0,1,abc,a.py --seed 1 --guidance-w 0,,1.0,\n")
    lines = bench("--ablations", "--list", **some | {"SEEDS": "90 91"})[1]  # that no kept result has
    assert len(lines) == 4 and all("KEEP=common/ablations.csv" in line for line in lines)
    rc, out, err = bench("--ablations", KEEP=str(kept), **some)
    assert rc == 0 and not err, (out, err)
    begin = "--env reacher-mini-v0 --seed {} --out-dir {}"
    folders = {k: f"{bench.out}-ablations/{k}" for k in ("--guidance-w_0", "--uq_none")}
    of = {stem: begin + f" --from-offline {bench.out}/{base}/reacher-mini-v0/seed{{}}"
          for stem, base in [("whole", "iql"), ("iql_cfdg", "iql_cfdg"), ("dual", "dual")]}  # fmt: skip
    calls = ["algorithms/iql.py " + begin.format(0, bench.out)]
    calls += [f"algorithms/iql_cfdg.py {of['whole'].format(0, bench.out, 0)}"]
    calls += [
        f"algorithms/iql_cfdg.py {of['iql_cfdg'].format(0, folders['--guidance-w_0'], 0)} --guidance-w 0"
    ]
    for seed in (0, 1):
        calls += ["algorithms/dual.py " + begin.format(seed, bench.out)]
        calls += [f"algorithms/dual.py {of['dual'].format(seed, folders['--uq_none'], seed)} --uq none"]
    assert sorted(line.rstrip() for line in bench.read("calls")) == sorted(calls)
    whole = [f"{bench.out}/{x}" for x in ("iql_cfdg/reacher-mini-v0/seed0",
             "dual/reacher-mini-v0/seed0", "dual/reacher-mini-v0/seed1")]  # fmt: skip
    places = "--guidance-w_0", "--uq_none", "--uq_none"
    ablated = [
        f"{bench.out}-ablations/{k}{x[len(str(bench.out)) :]}" for x, k in zip(whole, places, strict=True)
    ]
    told = sorted(bench.read("kept"))
    assert told == sorted(f"-m common.tools.report {x} --keep {kept}" for x in whole + ablated)
    bench.set(broken="dual")
    assert bench("--ablations", KEEP=str(kept), SEEDS="2", METHODS="dual")[0] == 1
    bad = dict(METHODS="iql"), dict(METHODS="iq"), dict(SEEDS="-1"), dict(ENVS="x"), dict(EXTRA="--utd 2")
    for variables in bad:
        rc, out, err = bench("--ablations", **variables)
        assert (rc, out, len(err.splitlines())) == (2, [], 1)
        assert err.startswith(f"error: {next(iter(variables))}: got ")


BAD = [
    dict(METHODS="iql_dar"), dict(ENVS="hopper-medium-v3"), dict(SEEDS="0 -1"), dict(SEEDS="01"), dict(JOBS="0"),
    dict(JOBS="two"), dict(METHODS="calql_dual", ENVS="antmaze-*"), dict(OUT="/proc/runs"), dict(EXTRA="--seed 3"),
    dict(PYTHON="/bin/false"), dict(KEEP="x.csv", EXTRA="--no-calibrate"),
]  # fmt: skip


@pytest.mark.parametrize("variables", BAD, ids=str)
def test_bad_values_are_refused_in_one_line(bench, variables):
    rc, out, err = bench(**{"METHODS": "iql", "SEEDS": "0"} | variables)
    assert (rc, out) == (2, []) and len(err.splitlines()) == 1
    assert next(k for k in reversed(variables)) in err and "allowed: " in err
    assert not bench.read("calls")


def test_bad_words(bench):
    for words in (["--lst"], ["--job", "iql"], ["--job", "foo", "hopper-mini-v0", "0"]):
        rc, out, err = bench(*words)
        assert (rc, out, len(err.splitlines())) == (2, [], 1)
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    rc, out, _ = bench("--help")
    assert rc == 0 and "METHODS" in "".join(out) and not any(line.startswith("#") for line in out)


def test_every_import_is_one_that_the_method_accepts(bench, monkeypatch):
    """All tasks of all methods, run in order: settings equal wherever --from-offline is given, and nowhere else."""
    rc, out, err = bench(SEEDS="0", JOBS="2")
    assert rc == 0 and not err and set(bench.called().values()) == {1}
    assert out[-1] == f"{len(bench.called())} of {len(bench.called())} jobs done, 0 failed"
    rc, out, _ = bench("--quick")
    assert rc == 0 and len(out) == 2 * len(FILES) + 2
    parsed = set()
    for line in bench.read("calls"):
        path, *flags = line.split()
        stem, env = Path(path).stem, flags[1]
        equal = offline_settings(stem, env) == offline_settings(BACKBONES[stem], env)
        given = {k: v for k, v in zip(flags[::2], flags[1::2], strict=True)}.get("--from-offline")
        if BACKBONES[stem] == stem:
            assert given is None
        elif equal:
            assert given == f"{bench.out}/{BACKBONES[stem]}/{env}/seed0"
        else:
            assert given is None
        if stem not in parsed:
            parsed.add(stem)
            monkeypatch.setattr(sys, "argv", [path, *flags])
            args = run.parse_args(module(stem).Args, module(stem).ENV_PRESETS)
            assert (args.env, args.seed, args.out_dir) == (env, 0, bench.out)
    assert parsed == set(FILES)


def test_a_failure_does_not_stop_the_rest(bench):
    bench.set(broken="iql_cfdg")
    chosen = dict(METHODS="iql iql_cfdg iql_edis", ENVS="hopper-medium-v2 pen-human-v1", SEEDS="0")
    rc, out, _ = bench(**chosen)
    log = bench.out / "logs/iql_cfdg-pen-human-v1-0.log"
    assert rc == 1 and len(bench.called()) == 6 and log.read_text() == "error: no such file\n"
    assert "FAILED (2): iql_cfdg pen-human-v1 0: error: no such file" in out
    assert "done: iql pen-human-v1 0: score 12.5" in out
    assert out[-3] == "4 of 6 jobs done, 2 failed" and out[-1] == f"failed: iql_cfdg pen-human-v1 0: {log}"
    (bench.folder / "broken").unlink()
    assert bench(**chosen)[0] == 0  # what is finished is not started again
    assert {k[0]: n for k, n in bench.called().items()} == {"iql": 1, "iql_cfdg": 2, "iql_edis": 1}


def test_a_broken_backbone_is_the_failure_of_its_methods(bench):
    bench.set(broken="iql")
    rc, out, _ = bench(METHODS="iql_dare dual", ENVS="hopper-medium-v2", SEEDS="0")
    assert rc == 1 and [m for m, *_ in bench.called()] == ["iql", "dual"]
    assert "FAILED (2, its backbone): iql_dare hopper-medium-v2 0: error: no such file" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_started_again(bench, number):
    """A signal reaches each program once, as SIGTERM; the same command does the rest."""
    chosen = dict(METHODS="iql iql_dare iql_edis calql", ENVS="hopper-medium-v2", SEEDS="0 1", JOBS="3")
    bench.set(seconds="20")
    process = bench.start(**chosen)
    bench.wait_for("calls", 3)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert len(bench.read("stopped")) == 3 == len(bench.read("calls"))
    bench.set(seconds="0")
    assert bench(**chosen)[0] == 0
    assert sorted(bench.called().values()) == [1, 1, 1, 1, 1, 2, 2, 2]


def test_a_killed_script_leaves_no_run_to_two_processes(bench):
    """SIGKILL: the program goes on; the same command waits for it and does the rest."""
    chosen = dict(METHODS="iql iql_dare", ENVS="hopper-medium-v2", SEEDS="0")
    bench.set(seconds="1")
    process = bench.start(**chosen)
    bench.wait_for("calls", 1)
    process.kill()
    process.communicate(timeout=20)
    assert bench(**chosen)[0] == 0 and set(bench.called().values()) == {1} and len(bench.called()) == 2


def test_parallel_jobs_train_a_backbone_once(bench):
    bench.set(seconds="0.5")
    chosen = dict(METHODS="iql_dare iql_cfdg iql_edis", ENVS="hopper-medium-v2", SEEDS="0")
    two = [bench.start(JOBS="3", **chosen) for _ in range(2)]
    for process in two:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(bench.called()) == 4 and set(bench.called().values()) == {1}


def test_the_list_through_a_launcher(bench, tmp_path):
    """In the reverse order, two at a time, from another folder, with variables that need quoting."""
    bench.out = tmp_path / "some runs"
    chosen = dict(METHODS="calql calql_dare edis", ENVS="antmaze-umaze-v2", SEEDS="0 1", EXTRA="--utd 2")
    lines = bench("--list", **chosen)[1]
    # the stand-in splits its note at blanks, so only what it leaves is looked at
    command = ["xargs", "-d", "\n", "-n", "1", "-P", "2", "bash", "-c"]
    found = subprocess.run(command, input="\n".join(lines[::-1]), text=True, cwd="/", capture_output=True)
    assert found.returncode == 0 and len(list(bench.out.glob("*/*/*/final.json"))) == 6
    assert all(line.endswith(" --utd 2") for line in bench.read("calls")) and len(bench.read("calls")) == 6


def test_without_a_gpu_the_time_is_said_first(bench):
    bench.set(gpu="False")
    rc, out, _ = bench(METHODS="iql", ENVS="hopper-medium-v2", SEEDS="0 1 2")
    assert rc == 0 and out[2][:5] == "start"
    assert out[1] == "no GPU: about 12 hours on one CPU core for what is left"  # 3 times 4
    line = bench("--quick", METHODS="iql *dare")[1][1]
    assert line == "no GPU: about 12 minutes on one CPU core for what is left"
    bench.set(gpu="True")
    assert "no GPU" not in "".join(bench("--quick", METHODS="iql", SEEDS="1")[1])


def test_a_real_program(bench):
    """At tiny sizes, without stand-in: a method starts from the offline phase of its backbone's run."""
    sizes = dict(offline_steps=20, online_steps=0, eval_episodes=1, device="cpu")
    extra = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in sizes.items())
    iql = module("iql")
    iql.train(run.with_presets(iql.Args, iql.ENV_PRESETS, "hopper-mini-v0", **sizes, out_dir=bench.out))
    job = ("iql_synther", "hopper-mini-v0", "0")
    rc, out, err = bench("--job", *job, EXTRA=extra, PYTHON=sys.executable)
    assert rc == 0, (out, err)
    assert [line.split(":")[0] for line in out] == ["start", "done"]
    log = (bench.out / "logs/iql_synther-hopper-mini-v0-0.log").read_text()
    assert f"offline phase of {bench.out}/iql/hopper-mini-v0/seed0/offline.pt" in log
