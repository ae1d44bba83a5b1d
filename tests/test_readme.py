"""Every command in README runs, in a copy of the project, in README's order, with sizes that take seconds."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FILES, ROOT, tiny_args

from common.tools import report

README = (ROOT / "README.md").read_text()
FIRST_WORDS = ["python", "python3", ".venv/bin/python", "uv", "bash", "pip", "METHODS="]
INSTALLATION = {  # needs a package index; the suite itself was installed by the like
    "python3 -m pip install uv", "uv venv", "uv sync --extra video", "uv pip install --torch-backend cpu -e .",
    "pip install -e .",
}  # fmt: skip
THIS = "uv run pytest -n auto"  # what has this very test run
SHORTER = {"--rows 90000 --epoch 249": "--rows 500 --epoch 1", "--rows 1000000": "--rows 600"}
NO_OPENGL = "error: --video: got no OpenGL"  # what a machine without it is told, in one line


def commands() -> list[str]:
    """Of blocks, a line each without its comment, and in running text; in order, once."""
    blocks = r"```bash\n(.*?)```"
    spans = re.findall(rf"{blocks}|`([^`]+)`", README, re.S)
    lines = [
        line for block, span in spans for line in (block.split("\n") if block else [" ".join(span.split())])
    ]
    lines = [re.sub(r"\s+#.*", "", line).removesuffix(" ...") for line in lines]
    found = [x for x in lines if " " in x and any(x.startswith((w + " ", w + '"')) for w in FIRST_WORDS)]
    return list(dict.fromkeys(found))


def tiny_flags(stem: str) -> list[str]:
    args = tiny_args(stem)
    usual = type(args)()
    changed = {k: v for k, v in vars(args).items() if v != getattr(usual, k) and k != "env"}
    return [x for k, v in changed.items() for x in ("--" + k.replace("_", "-"), str(v))]


def shorter(command: str) -> str:
    """The command as README has it, but for the interpreter and the sizes."""
    command = re.sub(r"^uv run (--no-sync )?(?=algorithms|pytest)", r"python ", command)
    command = re.sub(r"^(\.venv/bin/)?python (?=pytest)", "python -m ", command)
    command = re.sub(r"^(\.venv/bin/)?python ", f"{shlex.quote(sys.executable)} ", command)
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    if (m := re.search(r"algorithms/(\w+)\.py", command)) and "--help" not in command:
        stem = m[1] if m[1] in FILES else "iql"
        flags = [] if "--env" in command else ["--env", "reacher-mini-v0", "--seed", "1"]
        command = shlex.join([*shlex.split(command), *flags, *tiny_flags(stem)])
    if "run_all.sh" in command and "--list" not in command:
        command += " --list"
    return command + " --from-csv" * any(x in command for x in ("bench.py", "acting.py"))


def run_in(copy: Path, command: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    script = ["bash", "-c", command]
    return subprocess.run(script, cwd=copy, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "project"
    skip = shutil.ignore_patterns(
        "__pycache__", ".venv", "runs", ".git", "*.egg-info", ".pytest_cache", ".ruff_cache"
    )
    shutil.copytree(ROOT, folder, ignore=skip)
    collect = folder / "common" / "tools" / "collect.py"
    source = collect.read_text()
    long = "for _ in range(1_000):"  # SAC's updates of an epoch, which no flag shortens
    assert source.count(long) == 1
    collect.write_text(source.replace(long, "for _ in range(10):"))
    return folder


def test_every_command_in_readme_runs(copy):
    before = (copy / "README.md").read_bytes()
    told, started = {}, {}
    for command in commands():
        if command in INSTALLATION | {THIS}:
            continue
        start, short = time.monotonic(), shorter(command)
        if short not in started:  # with another interpreter it would be the same again
            started[short] = run_in(copy, short)
        done = told[command] = started[short]
        print(f"{time.monotonic() - start:5.1f} s  {command}")
        fine = done.returncode == 0 or ("--video" in command and done.stderr.startswith(NO_OPENGL))
        assert fine, f"{command}: {done.returncode}\n{done.stdout[-2_000:]}{done.stderr[-2_000:]}"
    assert (copy / "README.md").read_bytes() == before, "what README says is written again by its commands"
    assert set(commands()) >= INSTALLATION | {THIS}
    for part in (
        "common.tools.new",
        "common.tools.play",
        "common.tools.report",
        "run_all.sh --evidence",
        "cards check",
    ):
        assert any(part in x for x in told), part
    listed = len(told["bash run_all.sh --list"].stdout.splitlines())
    assert f"# {listed:,} commands" in README
    assert (copy / "runs" / "iql_my_method" / "reacher-mini-v0" / "seed0" / "final.json").exists()


def test_names_in_readme_are_those_of_the_project():
    """Files, settings and tests that README names exist; every method has its line."""
    assert all(f"{stem}.py" in README for stem in FILES)
    for name in re.findall(r"`(\S+\.(?:py|sh|csv|svg))`", README):
        folders = (ROOT, ROOT / "algorithms", ROOT / "tests", ROOT / "common")
        assert any((x / name).exists() for x in folders) or name in (
            "log.csv",
            "algorithms/iql_my_method.py",
        ), name
    known = {name for stem in FILES for name in vars(tiny_args(stem))}
    tools = {"list", "evidence", "ablations", "help", "watch", "video", "episodes", "human", "no_sync"}
    for name in re.findall(r"`--([a-z-]+)", README):
        name = name.replace("-", "_")
        assert name in known | tools or name.removeprefix("no_") in known, name


def test_the_headline_is_that_of_the_kept_results():
    """By hand, from the kept rows: a method is above its backbone if the interval of its differences is."""
    rows = report.read_rows(ROOT / "common" / "results.csv")
    text = report.headline(rows)
    assert f"{report.HEADLINE[0]}\n\n{text}\n{report.HEADLINE[1]}" in README
    with open(ROOT / "common" / "results.csv", newline="") as f:
        final = {(x["file"], x["env"], x["seed"]): float(x["final"]) for x in csv.DictReader(f)}
    seeds = [s for file, env, s in final if file == "iql_stratdiff" and env == "reacher-mini-v0"]
    pairs = [final["iql_stratdiff", "reacher-mini-v0", s] - final["iql", "reacher-mini-v0", s] for s in seeds]
    told = re.escape(f"`iql_stratdiff` {sum(pairs) / len(pairs):+.1f}")
    assert re.search(rf"`reacher-mini-v0`.*final score above: [^;]*{told}", text)
    few = [x for x in rows if x["seed"] in ("0", "1")]
    assert report.headline(few) == "No method has 5 pairs with its backbone yet."
