"""python -m common.tools.cards list | check: what is there, and whether a file is what it should be."""

import re
import subprocess
import sys

import h5py
import mujoco
import numpy as np
import pytest
from conftest import ROOT

from common import data


def card(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "common.tools.cards", *words], capture_output=True, text=True, cwd=ROOT
    )


def test_list_names_every_task_once_with_its_environment():
    done = card("list")
    lines = done.stdout.splitlines()[1:]
    assert done.returncode == 0 and done.stderr == "" and [x.split()[0] for x in lines] == list(data.TASKS)
    (mini,) = (x for x in lines if x.startswith("hopper-mini-v0"))
    assert mini.split()[1:5] == ["package", "yes", "89839", "7.4"] and mini.endswith("locomotion(Hopper-v4)")
    assert any(x.endswith("shifted(locomotion(Walker2d-v4), morphology, medium)") for x in lines)


def test_check_of_the_embedded_dataset():
    """Hash as registered, and its rows step again in the simulator, where no velocity is at its bound."""
    done = card("check", "hopper-mini-v0")
    told = done.stdout
    assert done.returncode == 0 and "(as registered)" in told and "rows         89839, all finite" in told
    assert "620 finished, 620 terminal; length 8 to 496" in told and "score 12.0" in told
    line = r"simulator    (\d+) rows .* median (\S+), over 1e-3 in (\S+)%"
    rows, median, over = re.search(line, told).groups()
    assert int(rows) > 500
    if mujoco.__version__ >= "4":  # collected with 4.0; older versions have other contacts
        assert float(median) < 1e-6 and float(over) < 5
    else:
        assert float(median) < 0.05


def test_check_sees_rewards_of_another_task(tmp_path):
    """The file's name says for which task it is read; steps that are not the task's stand out."""
    path = tmp_path / "hopper_wrong.hdf5"
    dataset = data.load("hopper-mini-v0")
    with h5py.File(path, "w") as f:
        for k, v in (("observations", dataset.obs), ("actions", dataset.actions), ("rewards", dataset.rewards + 1),
                     ("next_observations", dataset.next_obs), ("terminals", dataset.terminations)):  # fmt: skip
            f[k] = v[:2_000]
        f["timeouts"] = np.zeros(2_000, bool)
    told = card("check", str(path)).stdout
    assert "read as hopper-random-v2" in told and "not the registered file" in told
    assert float(re.search(r"of rewards, median (\S+),", told).group(1)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("check", "nonsense"), "--env: got nonsense"),
        (("check", "README.md"), "the task that the file is for"),
        (("check", "README.md", "--env", "hopper-mini-v0"), "unreadable"),
    ],
)
def test_cards_refuse_in_one_line(words, says):
    done = card(*words)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
