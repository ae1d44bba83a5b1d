"""Speed without a stop-watch: operators, arithmetic, what the host reads; compiled and captured steps and plain ones.

Budgets are of a step at published sizes as tests/bench.py builds it, with its sampling and learning rate, on rows of
hopper (27 features). Operators are those that are no views.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import bench
import numpy as np
import pytest
import torch
from conftest import CPU, FILES, module
from test_iql import CountDispatches
from torch.utils.flop_counter import FlopCounterMode

from algorithms import calql, iql, iql_dare, synther, wsrl
from common import edm, run
from common.buffer import Batch, ReplayBuffer

ROWS = 500


def rows_of(obs_dim: int, act_dim: int, dtype: torch.dtype = torch.float32) -> Batch:
    own = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=own, dtype=dtype)

    actions, terminations = draw(ROWS, act_dim).clamp(-1, 1), (torch.arange(ROWS) % 7 == 0).to(dtype)
    return Batch(draw(ROWS, obs_dim), actions, draw(ROWS), draw(ROWS, obs_dim), terminations)


@pytest.fixture
def offline(monkeypatch) -> ReplayBuffer:
    """What bench.py measures on, with few rows, generated two at once."""
    monkeypatch.setattr(bench, "ROWS", ROWS)
    monkeypatch.setitem(bench.CHUNK, "cpu", 2)
    buffer = ReplayBuffer(ROWS, 11, 3, CPU)
    buffer.extend(rows_of(11, 3))
    return buffer


@pytest.fixture
def small_batch(monkeypatch) -> None:
    """64 states: calql.py splits more of them on a CPU, for its cache, which a GPU never sees."""
    monkeypatch.setattr(calql, "Args", partial(calql.Args, batch_size=64))


OURS: dict[str, Callable] = {
    "IQL": lambda offline: bench.iql_step(offline, CPU, False),
    "PEX": lambda offline: bench.pex_step(offline, CPU, False),
    "Cal-QL": lambda offline: bench.calql_step(offline, CPU, False),
    "WSRL": lambda offline: bench.wsrl_step(offline, CPU, False),
    "APL": lambda offline: bench.apl_step(offline, CPU, False, bench.as_it_is),
    "Diffuser": lambda offline: bench.diffuser_step(offline, CPU, False),
    "EDM": lambda offline: bench.edm_step(offline, CPU, False),
    "EDM sample": lambda offline: bench.generator(offline, CPU, False).sample_step,
    "behavior": lambda offline: bench.guide(offline, CPU, False).behavior_step,
    "references": lambda offline: bench.references_step(offline, CPU, False),
}
TEXTBOOKS: dict[str, Callable] = {
    "IQL": lambda: bench.iql_textbook(rows_of(11, 3), CPU),
    "PEX": lambda: bench.iql_textbook(rows_of(11, 3), CPU, expanded=True),
    "Cal-QL": lambda: bench.calql_textbook(rows_of(11, 3), CPU),
    "WSRL": lambda: bench.wsrl_textbook(rows_of(11, 3), CPU),
    "APL": lambda: bench.apl_textbook(rows_of(11, 3), CPU),
    "Diffuser": lambda: bench.diffuser_textbook(rows_of(11, 3), CPU),
    "EDM": lambda: bench.edm_textbook(rows_of(11, 3), CPU),
    "behavior": lambda: bench.behavior_textbook(rows_of(11, 3), CPU),
}


def count(step: Callable) -> CountDispatches:
    step()  # optimizer state
    with CountDispatches() as counted:
        step()
    return counted


def flop(step: Callable) -> int:
    """Of matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops()


# ---- budgets ----


@pytest.mark.usefixtures("small_batch")
@pytest.mark.parametrize(
    ("name", "most"),
    # As counted, a little rounded up; a sample is 255 evaluations, references are 15. Only logged: 22 of Cal-QL's, the
    # density of the data, and as many of the references', their Q. EDM's has 18 in drawing and normalising.
    [("IQL", 150), ("PEX", 230), ("Cal-QL", 265), ("APL", 300), ("WSRL", 800), ("EDM", 150), ("EDM sample", 12_500),
     ("behavior", 220), ("references", 1_620)],
)  # fmt: skip
def test_operators_of_a_step_and_nothing_read_back(name, most, offline):
    counted = count(OURS[name](offline))
    assert most / 2 < counted.operators <= most  # far above, a budget would say nothing
    assert counted.reads == 0


def test_an_evaluation_of_guided_references_takes_130_operators_at_most(offline):
    assert count(OURS["references"](offline)).operators / 15 <= 130


def weights(*sizes: int) -> int:
    return sum(i * o for i, o in pairwise(sizes))


def edm_flop(features: int, time_dim: int) -> int:
    """Of a training step, by hand: 2 FLOP per weight and row forward, 4 backward, but 2 where the input is data.

    Data are read by the inlet and by the first layer of the time embedding (17 numbers).
    """
    first = weights(features, time_dim) + weights(17, time_dim)
    rest = weights(time_dim, time_dim) + weights(time_dim, *[1_024] * 7, features)
    return 256 * (4 * first + 6 * rest)


def test_iql_does_the_arithmetic_it_should(offline):
    assert flop(OURS["IQL"](offline)) == pytest.approx(0.5243e9, rel=0.01)


def test_edm_does_the_arithmetic_it_should(offline):
    """10.22 GFLOP with 26 features and 256 numbers for the time; 9.94 with 128, as SynthER has them offline."""
    assert flop(OURS["EDM"](offline)) == pytest.approx(edm_flop(26, 256), rel=1e-6)
    assert edm_flop(26, 256) == pytest.approx(10.22e9, rel=0.001)
    net, x = synther.TransitionNet(26, 1_024, 6, 128), torch.zeros(256, 26)
    found = flop(lambda: edm.loss(net, x, torch.ones(256)).backward())
    assert found == pytest.approx(edm_flop(26, 128), rel=1e-6) == pytest.approx(9.94e9, rel=0.02)


def calql_flop() -> int:
    """Of an update, by hand: critics on 31 actions per state, the actor on s and s', the targets, the actor's loss."""
    critic, actor = 2 * weights(14, 256, 256, 256, 1), weights(11, 256, 256, 256, 6)
    on_data = 7_936 * (6 * critic - 2 * 2 * weights(14, 256))
    policy = 512 * (6 * actor - 2 * weights(11, 256))
    return on_data + policy + 256 * (2 * critic + 4 * critic)  # targets; the actor's loss, critics frozen


def test_calql_does_the_arithmetic_it_should(offline):
    assert flop(OURS["Cal-QL"](offline)) == pytest.approx(calql_flop(), rel=1e-6)
    assert calql_flop() <= 13.6e9


# ---- the textbooks of bench.py ----


@pytest.mark.parametrize("name", TEXTBOOKS)
def test_textbooks_do_the_same_arithmetic(name, offline):
    """Within 2 %; Cal-QL's 9 % and APL's 4 % more: the actor runs on each state once per sampled action, as in CORL."""
    ratio = flop(TEXTBOOKS[name]()) / flop(OURS[name](offline))
    assert ratio == pytest.approx({"Cal-QL": 1.09, "APL": 1.04}.get(name, 1.0), abs=0.02)


def test_textbook_references_are_ours(offline, monkeypatch):
    """The same networks, states and noise give the same actions: it is the same solver."""
    torch.manual_seed(0)
    behavior, energy = iql_dare.BehaviorNet(11, 3, 512), iql_dare.EnergyNet(11, 3, 256)
    monkeypatch.setattr(iql_dare, "BehaviorNet", lambda *_: behavior)
    monkeypatch.setattr(iql_dare, "EnergyNet", lambda *_: energy)
    sample = bench.references_textbook(offline.take(torch.arange(ROWS)), CPU)
    monkeypatch.setattr(bench.np.random, "randint", lambda low, high, size: np.arange(size) % (high - low))
    torch.manual_seed(1)
    found = sample()
    torch.manual_seed(1)
    noise, obs = torch.randn(256, 3), offline.obs[:256]
    with torch.no_grad():
        eps_fn = iql_dare.guided_eps(behavior, energy, obs, iql_dare.Args().guidance_scale)
        expected = iql_dare.sample_actions(eps_fn, noise)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert found.std() > 0.1


def test_textbook_samples_are_ours(monkeypatch):
    """Without churn, from the same noise, by the same network."""
    torch.manual_seed(0)
    net = bench.transition_net(CPU)
    monkeypatch.setattr(bench, "transition_net", lambda _: net)
    monkeypatch.setattr(synther.Args, "sample_churn", 0.0)
    torch.manual_seed(1)
    found = bench.sampling_textbook(CPU, 2)()
    torch.manual_seed(1)
    x, ones = edm.SIGMA_MAX * torch.randn(2, 27), torch.ones(2)
    with torch.no_grad():
        expected = edm.sample(lambda x, sigma: edm.denoise(net, x, sigma * ones), x, 128, 0.0)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


# ---- compiled and captured ----


# A case makes networks in float64 and returns a file's losses; a function that calls them, or what is compiled of them,
# on rows `index` (16,) with `noise` (16, 18); and what makes a gradient step of the result


def iql_case(device: torch.device) -> tuple[Callable, Callable, Callable]:
    nets, args = iql.make_nets(5, 2, 8).double().to(device), iql.Args()
    opt = iql.make_optimizer(nets, 3e-3, device)
    table = Batch(*(x.to(device) for x in rows_of(5, 2, torch.float64)))

    def call(losses: Callable, index: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return losses(nets, Batch(*(x.index_select(0, index) for x in table)), args)[0]

    return iql.losses, call, lambda loss: iql.update(nets, opt, loss, 0.005)


def calql_case(device: torch.device) -> tuple[Callable, Callable, Callable]:
    nets, args = calql.make_calql_nets(5, 2, 8, 2).double().to(device), calql.Args(cql_n_actions=2)
    opt = calql.make_calql_optimizer(nets, 1e-3, 3e-3, device)
    table = Batch(*(x.to(device) for x in rows_of(5, 2, torch.float64)))

    def call(losses: Callable, index: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        batch = Batch(*(x.index_select(0, index) for x in table))
        uniform, normal = noise[:, :4].tanh().unflatten(1, (2, 2)), noise[:, 4:].unflatten(1, (7, 2))
        return losses(nets, batch, batch.rewards, 5.0, (uniform, normal), args)[0]

    return calql.losses, call, lambda loss: calql.update(nets, opt, loss, 0.005)


def edm_case(device: torch.device) -> tuple[Callable, Callable, Callable]:
    net = synther.TransitionNet(10, 8, 2, 4).double().to(device)
    opt = torch.optim.Adam(net.parameters(), 3e-3, fused=True, capturable=device.type == "cuda")
    table, average = torch.cat(rows_of(5, 2, torch.float64)[0:4:3], 1).to(device), edm.EMA(net)

    def call(loss: Callable, index: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return loss(net, table.index_select(0, index), noise[:, 0].exp())

    def learn(loss: torch.Tensor) -> None:  # as in Generator.train_step
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        average.update(net)

    return edm.loss, call, learn


def wsrl_case(device: torch.device) -> tuple[Callable, Callable, Callable]:
    """The offline losses, which have those of an online update in them."""
    nets, args = wsrl.make_wsrl_nets(5, 2, 8, 2, 4, True).double().to(device), wsrl.Args(cql_n_actions=1)
    opt = wsrl.make_wsrl_optimizer(nets, 1e-3, 3e-3, device)
    table = Batch(*(x.to(device) for x in rows_of(5, 2, torch.float64)))
    critics = torch.tensor([0, 2], device=device), torch.tensor([1, 1], device=device)

    def call(losses: Callable, index: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        batch = Batch(*(x.index_select(0, index) for x in table))
        uniform, policy, backup, actor = noise[:, :10].split([2, 4, 2, 2], 1)
        normal = policy.unflatten(1, (2, 2)), backup[:, None], actor
        return losses(nets, batch, batch.rewards, (*critics, uniform[:, None].tanh(), *normal), args)[0]

    def learn(loss: torch.Tensor) -> None:
        wsrl.learn(opt, loss)
        wsrl.follow(nets, 0.005)

    return wsrl.losses, call, learn


CASES = {"IQL": iql_case, "Cal-QL": calql_case, "WSRL": wsrl_case, "EDM": edm_case}
UPDATES = 200


def trace(
    name: str, device: torch.device, compiled: bool = False, captured: bool = False, learning: bool = True
) -> torch.Tensor:
    """Losses of 200 updates from one state, with the same rows and noise, drawn beforehand; (200,)."""
    torch.manual_seed(0)
    torch.compiler.reset()  # what other tests compiled
    losses, call, learn = CASES[name](device)
    losses = torch.compile(losses) if compiled else losses
    indices = torch.randint(ROWS, (UPDATES, 16)).to(device)
    noises = torch.randn(UPDATES, 16, 18, dtype=torch.float64).to(device)
    noise, seen = torch.zeros_like(noises[0]), torch.zeros_like(noises[:, 0, 0])
    now = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> dict:
        noise.copy_(noises.index_select(0, now)[0])
        loss = call(losses, indices.index_select(0, now)[0], noise)
        if learning:
            learn(loss)
        seen.index_copy_(0, now, loss.detach()[None])
        now.add_(1)
        return {}

    step_fn = run.CapturedStep(step) if captured else step
    with pytest.MonkeyPatch.context() as m, torch._dynamo.config.patch(error_on_recompile=True):
        # edm.loss; inductor would draw other numbers
        m.setattr(torch, "randn_like", lambda _: noise[:, 1:11])
        for _ in range(UPDATES):
            step_fn()
    return seen.cpu()


@pytest.mark.parametrize("name", CASES)
def test_losses_compile_as_one_graph(name):
    """A part that cannot be compiled splits what is around it. Without code generation."""
    torch.compiler.reset()
    losses, call, _ = CASES[name](CPU)
    whole = torch.compile(losses, backend="eager", fullgraph=True)
    index, noise = torch.arange(16), torch.randn(16, 18, dtype=torch.float64)
    assert call(whole, index, noise).isfinite()


@pytest.mark.parametrize("name", CASES)
def test_compiled_and_plain_losses_agree_over_200_updates(name):
    """In float64: in float32 Adam makes percents of rounding. Compiled once for all of them."""
    plain, compiled = trace(name, CPU), trace(name, CPU, compiled=True)
    assert torch.allclose(compiled, plain, rtol=1e-8, atol=0)
    change = trace(name, CPU, learning=False) - plain
    assert change.abs().mean() > 0.01 * plain.abs().mean()  # the numbers depend on the updates before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_captured_and_called_steps_agree_over_200_updates(name, compiled):
    called, captured = (trace(name, torch.device("cuda"), compiled, captured=c) for c in (False, True))
    assert torch.allclose(captured, called, rtol=1e-8, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_a_plain_step_never_waits_for_the_gpu(name):
    torch.manual_seed(0)
    device = torch.device("cuda")
    losses, call, learn = CASES[name](device)
    index, noise = torch.arange(16, device=device), torch.randn(16, 18, dtype=torch.float64, device=device)
    learn(call(losses, index, noise))  # optimizer state
    torch.cuda.set_sync_debug_mode("error")
    try:
        learn(call(losses, index, noise))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the table that bench.py keeps, and what it projects ----


def row(**changes: str) -> dict[str, str]:
    return dict(zip(bench.COLUMNS, ["IQL update", "textbook", "50", "1.00", "", "X", "1", "2.8", "3.11"],
                    strict=True)) | changes  # fmt: skip


def test_what_is_not_measured_again_stays(tmp_path, monkeypatch, capsys):
    """New rows replace those of the same thing and device; --from-csv writes the same README again."""
    kept, readme = tmp_path / "bench.csv", tmp_path / "README.md"
    readme.write_text("a\n<!-- speed -->\nold\n<!-- end speed -->\nb\n")
    bench.write_rows([row(), row(what="EDM sample"), row(device="GPU", threads="", peak_mib="7")], kept)
    monkeypatch.setattr(bench, "measure", lambda *_: [row(per_second="60")])
    bench.main(bench.Args(device="cpu", csv=kept, readme=readme))
    rows = bench.read_rows(kept)
    assert [(r["what"], r["device"], r["per_second"]) for r in rows] == [
        ("IQL update", "X", "60"), ("EDM sample", "X", "50"), ("IQL update", "GPU", "50"),
    ]  # fmt: skip
    text = readme.read_text()
    assert text.startswith("a\n<!-- speed -->\n\nX, 1 thread, torch 2.8:\n")
    assert text.endswith("|\n\n<!-- end speed -->\nb\n")
    for line in ("| IQL update | textbook | 60 | 1.00 |\n", "| IQL update | textbook | 50 | 1.00 | 7 |\n"):
        assert line in text
    monkeypatch.setattr(bench, "measure", None)
    bench.main(bench.Args(csv=kept, readme=readme, from_csv=True))
    assert readme.read_text() == text and "old" not in text
    assert capsys.readouterr().out.count("| IQL update | textbook | 60 |") == 2


def test_readme_has_the_table_of_the_kept_figures(tmp_path, capsys):
    """Byte for byte what --from-csv writes, which is also what it prints."""
    copy, text = tmp_path / "README.md", (bench.ROOT / "README.md").read_text()
    begin, end = (text.index(m) for m in bench.MARKERS)
    copy.write_text(text[: begin + len(bench.MARKERS[0])] + text[end:])
    bench.main(bench.Args(csv=bench.ROOT / "tests" / "bench.csv", readme=copy, from_csv=True))
    assert copy.read_text() == text
    assert capsys.readouterr().out.strip() == text[begin + len(bench.MARKERS[0]) : end].strip()


@pytest.mark.parametrize(
    "text", ["", "<!-- speed -->", "<!-- end speed --><!-- speed -->", 2 * "<!-- speed --><!-- end speed -->"]
)
def test_a_readme_without_its_markers_is_refused_before_anything_is_measured(text, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(run.UsageError, match="--readme"):
        bench.main(bench.Args(readme=tmp_path / "README.md"))


def test_bad_usage_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for flag, changes in (
        ("--csv", dict(csv=tmp_path / "other.csv")), ("--csv", dict(csv=tmp_path / "no" / "x.csv")),
        ("--csv", dict(csv=tmp_path / "none.csv", from_csv=True)), ("--from-csv", dict(from_csv=True)),
        ("--files", dict(files=("iq",))), ("--rounds", dict(rounds=0)),
    ):  # fmt: skip
        with pytest.raises(run.UsageError, match=flag):
            bench.main(bench.Args(**changes))


def test_budgets_are_those_of_the_files():
    """Gradient steps and rows of published runs on hopper-medium-v2, by hand from each file's Args."""

    def of(stem: str) -> dict[str, int]:
        return bench.budget(stem, "hopper-medium-v2")

    assert of("iql") == {
        "offline": 1_000_000, "online": 200_000,
        "evaluation offline": 200 * 10 * 1_000, "evaluation online": 40 * 10 * 1_000,
    }  # fmt: skip
    assert of("synther")["generator"] == 19 * 50_000 and of("synther")["sampling"] == 19 * 100_000
    assert of("iql_edis")["generator"] == 20 * 30_000 and of("iql_edis")["pool"] == 20 * 10_000
    assert of("iql_cfdg")["generator"] == 9 * 100_000 and of("iql_cfdg")["sampling"] == 9 * 125_000
    assert of("calql_ad2s")["generator"] == 20 * 50_000
    assert of("dual")["distill"] == 7 * 20_000 and of("dual")["planner"] == 500_000
    assert of("dual")["transition"] == 1_000_000
    assert of("calql_dare")["behavior"] == 600_000 and of("calql_dare")["energy"] == 100_000
    assert bench.budget("iql", "antmaze-umaze-v2")["evaluation online"] == 20 * 100 * 700


def test_shared_offline_phases_are_counted_once(monkeypatch):
    """Ten gradient steps an hour, the rest for nothing: 1M steps of two tasks and two seeds, for three methods."""
    monkeypatch.setenv("METHODS", "iql iql_dare iql_stratdiff dual")
    monkeypatch.setenv("ENVS", "hopper-medium-v2 walker2d-medium-v2")
    monkeypatch.setenv("SEEDS", "0 1")
    phases = "offline online behavior energy support evaluation planner distill transition"
    free = dict.fromkeys(phases.split(), float("inf"))
    three = {stem: free for stem in ("iql", "iql_dare", "iql_stratdiff")}
    hour = {stem: free | {"offline": 10 / 3600} for stem in three}
    assert bench.whole_list(hour) == f"run_all.sh: 12 of 16 jobs, one after the other: {4 * 100_000} hours"
    hour = {stem: free | {"behavior": 10 / 3600} for stem in three}
    assert bench.whole_list(hour).endswith(f": {4 * 60_000} hours")
    own = bench.whole_list({"dual": free | {"offline": 10 / 3600}})
    assert own == f"run_all.sh: 4 of 16 jobs, one after the other: {4 * 100_000} hours"


@pytest.mark.parametrize("stem", FILES)
def test_short_phases_are_settings_that_a_run_accepts(stem):
    """`few` leaves out what has no effect: diffql.py's halvings without --distill are refused."""
    file = module(stem)
    args = bench.few(file, 3, False)
    run.check_needs(args, file.ENV_PRESETS, getattr(file, "NEEDS", {}))
    phases = {
        k: v for k, v in vars(args).items() if k in ("offline_steps", "planner_steps", "diffusion_steps")
    }
    assert set(phases.values()) == {3}
