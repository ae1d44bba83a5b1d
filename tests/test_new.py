"""Starting a method: the new file keeps the house rules, trains as its source at 0 and otherwise above it; refusals."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shared_blocks
from conftest import FILES, ROOT, TINY, log_rows, module

from common import run, usage
from common.tools import new

WITHOUT = {"diffuser", "calql_dual"}  # their losses are not a function `losses`
SOURCES = [stem for stem in FILES if stem not in WITHOUT]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of algorithms/ that the tool writes to."""
    monkeypatch.setattr(new, "FOLDER", Path(shutil.copytree(ROOT / "algorithms", tmp_path / "algorithms")))
    return new.FOLDER


def start(source: str, name: str = "mine") -> Path:
    new.main(new.Args(source, name))
    return new.FOLDER / f"{source}_{name}.py"


def ruff(*words: object) -> str:
    """What it has to say; nothing if all is well."""
    command = [sys.executable, "-m", "ruff", *words, "--quiet", "--config", ROOT / "pyproject.toml"]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    return done.stdout + done.stderr


def load(path: Path):
    """The algorithm at `path`, as a module."""
    spec = importlib.util.spec_from_file_location(f"started_{path.stem}", path)
    algorithm = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = algorithm  # where dataclasses look for their types
    spec.loader.exec_module(algorithm)
    return algorithm


def trained(path: Path, out_dir: Path, **changes) -> list[dict[str, str]]:
    """The log of 20 offline and 20 online steps with the file at `path`."""
    algorithm = load(path)
    small = TINY | {"online_steps": 20, "eval_every": 10, "eval_episodes": 1} | changes
    small = {k: v for k, v in small.items() if k in algorithm.Args.__dataclass_fields__}
    algorithm.train(algorithm.Args(env="reacher-mini-v0", out_dir=out_dir, **small))
    assert len(list(out_dir.glob("**/final.json"))) == 1
    return log_rows(out_dir)


def test_every_file_can_be_the_source_but_two(folder):
    """One name for all: clean, formatted, no fence, one body per name; also with the longest name, and of a copy."""
    written = [start(source) for source in SOURCES]
    written += [start(source, "a_name_of_thirty_characters_aa") for source in SOURCES]
    written.append(start("iql_mine", "more"))
    assert ruff("check", folder) == "" and ruff("format", "--check", folder) == ""
    assert shared_blocks.check(folder.parent) == []
    for path in written:
        text = path.read_text()
        assert "# ---" not in text and f"python algorithms/{path.name} " in text
        _, page, code = text.split('"""', 2)
        ids = (set(re.findall(r"\b[DU]\d+\b", x)) for x in (page, code))
        assert len(set(map(frozenset, ids))) == 1  # told and used are the same
    for source in WITHOUT:
        with pytest.raises(run.UsageError, match=rf"source: got {source}\.py; allowed: .*`losses`.*by hand"):
            start(source)


@pytest.mark.parametrize("source", ["iql", "calql", "iql_cfdg"])
def test_a_new_file_trains_as_its_source_at_0_and_otherwise_above(source, folder, tmp_path):
    path = start(source)
    plain = trained(folder / f"{source}.py", tmp_path / "plain")
    zero = trained(path, tmp_path / "zero")
    assert [{k: v for k, v in row.items() if k != "loss/mine"} for row in zero] == plain
    assert {row["loss/mine"] for row in zero} - {""} == {"0.0"}
    pulled = trained(path, tmp_path / "pulled", mine_weight=0.5)
    assert min(float(row["loss/mine"]) for row in pulled if row["loss/mine"]) > 0
    assert [row["q/mean"] for row in pulled] != [row["q/mean"] for row in plain]


def test_what_is_new_is_marked_and_has_its_place(folder):
    """A setting with a range and a group, a preset of both embedded tasks, an offline setting."""
    path = start("calql", "mine")
    added = set(path.read_text().split("\n")) - set((folder / "calql.py").read_text().split("\n"))
    assert sum("NEW" in line for line in added) == 11
    mine = load(path)
    with pytest.raises(run.UsageError, match=r"--mine-weight: got -1.0; allowed: \[0, inf\)"):
        run.check_limits(mine.Args(mine_weight=-1.0))
    for env in ("hopper-mini-v0", "reacher-mini-v0", "pen-human-v1"):
        theirs = vars(run.with_presets(module("calql").Args, module("calql").ENV_PRESETS, env))
        ours = vars(run.with_presets(mine.Args, mine.ENV_PRESETS, env))
        assert ours == theirs | {"mine_weight": 0.01 if "mini" in env else 0.0}
    assert set(mine.OFFLINE_SETTINGS) == {*module("calql").OFFLINE_SETTINGS, "mine_weight"}
    assert usage.groups(mine.Args)["NEW: mine"].keys() == {"mine_weight"}


@pytest.mark.parametrize(
    "source, name, told",
    [
        ("ddpg", "mine", r"source: got ddpg; allowed: apl, apl_cfdg, .*, wsrl_ad2s"),
        ("iql", "cfdg", r"name: got cfdg; allowed: one without a file .*iql_cfdg\.py"),
        ("iql", "v", r"name: got v; allowed: one whose v_weight and v_loss are not in iql\.py yet"),
        *[("iql", x, f"name: got {x}; allowed: lower-case") for x in ("1st", "my-way", "Mine", "", "_x", "x" * 31)],
        ("iql", "../mine", r"name: got \.\./mine; allowed: lower-case"),
    ],
)  # fmt: skip
def test_refusals(source, name, told, folder):
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(run.UsageError, match=told):
        start(source, name)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_on_the_command_line(tmp_path):
    """A project of its own: what is written runs by its path; again is refused; -h; one word too few."""
    shutil.copytree(ROOT / "algorithms", tmp_path / "algorithms")
    (tmp_path / "common").symlink_to(ROOT / "common")

    def call(*words: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    tool = "-m", "common.tools.new"
    done = call(*tool, "iql", "my_method")
    command = re.search(r"python (algorithms/iql_my_method\.py --env reacher-mini-v0)\n", done.stdout)[1]
    assert done.returncode == 0 and not done.stderr and "needs a name of its own" in done.stdout
    steps = "--offline-steps=20", "--online-steps=20", "--warmup-steps=0", "--eval-episodes=1"
    ran = call(*command.split(), *steps)
    assert ran.returncode == 0, ran.stderr
    assert "my_method_weight=0.01 (preset)" in ran.stdout
    assert list(tmp_path.glob("runs/iql_my_method/reacher-mini-v0/seed0/final.json"))
    again, short, helped = call(*tool, "iql", "my_method"), call(*tool, "iql"), call(*tool, "-h")
    assert again.returncode == 2 and again.stderr.startswith(
        "error: name: got my_method; allowed: one without"
    )
    assert short.returncode == 2 and short.stderr.startswith("error: ") and short.stderr.count("\n") == 1
    assert helped.returncode == 0 and "SOURCE NAME" in helped.stdout
