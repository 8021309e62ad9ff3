"""The prior against mathematics: every code of L = 4 positions and V = 3 values can be listed. Then a device
without float64, and its training where a flag came later and where the system is not Linux."""
import itertools
import math
import subprocess
import sys

import prior
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, ROOT, FakeRun, call, prepare, refuse, results, same, stopped_after, weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

L, V = 4, 3
CODES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # all 81
SAMPLER = {"temperature": 1.0, "nucleus": 1.0, "order": "event", "per_step": 1, "order_noise": 1.0,
           "steps": 64, "remask": 0.0, "remask_window": [0.3, 0.55], "rounds": 2, "round_share": 0.25}


def tiny(causal, tables="position", codes=L, values=V, per_token=1):
    """A prior whose outputs and gains are not those that it starts with."""
    torch.manual_seed(0)
    model = prior.Prior(codes, values, 16, 2, 2, 0.0, causal, tables, per_token).requires_grad_(False).eval()
    torch.nn.init.normal_(model.head, std=0.5)
    for name, p in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            torch.nn.init.uniform_(p, 0.5, 2)
    return model


class Known:
    """A masked "network" that knows a distribution over the 81 codes, and so all conditional ones."""

    def __init__(self, p):
        self.p = p / p.sum()
        self.L, self.V = L, V
        self.causal = False
        self.asked = []

    def __call__(self, codes):
        device = codes.device
        codes = codes.cpu()
        self.asked.append(codes)
        fits = ((codes[:, None] == CODES) | (codes[:, None] == V)).all(2) * self.p  # (B, 81)
        p = torch.einsum("bc,clv->blv", fits / fits.sum(1, keepdim=True), F.one_hot(CODES, V).double())
        return p.clamp(min=1e-30).log().float().to(device)


def rng(seed=0):
    """A random generator."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def known():
    return Known(torch.rand(81, generator=rng(1), dtype=torch.float64) ** 4)


def hidden(count):
    """Codes of which nothing is given."""
    return torch.full((count, L), V)


def sample(model, codes, log_weights=None, **sampler):
    """prior.sample_masked with some settings changed."""
    return prior.sample_masked(model, codes, SAMPLER | sampler, FakeRun(), rng(), log_weights)


def distance(codes, p):
    """Sum over the 81 codes of the difference between their frequencies and their probabilities."""
    counts = torch.bincount((codes * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    return (counts / len(codes) - p / p.sum()).abs().sum()


# --- likelihoods ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tables, per_token", [
    ("position", 1), ("shared", 1), ("position", 2), ("shared", 4)])
def test_ar_likelihoods_of_all_codes_sum_to_one(run, tables, per_token):
    model = tiny(True, tables, per_token=per_token)
    nll = prior.ar_nll(model, CODES, run).double()
    assert abs(torch.exp(-nll * L).sum() - 1) < 1e-5
    bits, error = prior.bits_per_token(model, CODES, run)
    assert bits * math.log(2) == pytest.approx(nll.mean().item())
    assert error * math.log(2) == pytest.approx(nll.std().item() / 9, rel=0.01)


@pytest.mark.parametrize("per_token", [1, 2])
def test_ar_is_causal_and_sees_all_that_came_before(per_token):
    model = tiny(True, per_token=per_token)
    codes = CODES[:1]
    for position in range(L):
        other = codes.clone()
        other[0, position] = 2
        equal = (model(codes) == model(other)).all(2)[0]
        assert equal[:position + 1].all() and not equal[position + 1:].any()


@pytest.mark.parametrize("tables, length, per_token", [
    ("position", L, 1), ("shared", L, 1), ("shared", 150, 1), ("position", 8, 4), ("shared", 150, 2)])
def test_the_cache_equals_the_full_forward(run, monkeypatch, tables, length, per_token):
    """What a value is drawn from is what the network says of all that were drawn."""
    model = tiny(True, tables, length, 7, per_token)
    shown, draw_values = [], prior.draw_values

    def noted(logits, *more):
        shown.append(logits)
        return draw_values(logits, *more)

    monkeypatch.setattr(prior, "draw_values", noted)
    codes, _ = prior.sample_ar(model, 3, SAMPLER, run, rng())
    assert torch.allclose(torch.stack(shown, 1), model(codes), atol=1e-4)


def exact_bound(model):
    """Bound (1) in nats per token for all 81 codes, by listing every set of hidden positions."""
    total = torch.zeros(81, dtype=torch.float64)
    for k in range(1, L + 1):
        for positions in map(list, itertools.combinations(range(L), k)):
            visible = CODES.clone()
            visible[:, positions] = V
            log_p = model(visible).double().log_softmax(-1).gather(2, CODES[..., None])[..., 0]
            total -= log_p[:, positions].sum(1) / k / math.comb(L, k) / L
    return total


@pytest.mark.parametrize("per_token", [1, 2])
def test_the_masked_estimate_is_unbiased_for_the_bound_of_every_code(run, per_token):
    model = tiny(False, per_token=per_token)
    codes = CODES[[0, 33, 80]].repeat_interleave(3000, 0)
    uniform = torch.rand(len(codes), 1 + L, generator=rng())
    estimate = prior.masked_nll(model, codes, V, uniform[:, 0], uniform[:, 1:], run).view(3, 3000).mean(1)
    assert (estimate - exact_bound(model)[[0, 33, 80]]).abs().max() < 0.03
    bits, error = prior.bits_per_token(model, CODES.repeat(100, 1), run)
    assert 0 < error < 0.03 and abs(bits - exact_bound(model).mean() / math.log(2)) < 4 * error


def test_the_bound_is_above_the_truth_and_tight_for_exact_conditionals(known):
    """Averaged over the data it is at least the entropy, which an exact network reaches."""
    entropy = -(known.p * known.p.log()).sum() / L
    assert abs((known.p * exact_bound(known)).sum() - entropy) < 1e-5
    assert (known.p * exact_bound(tiny(False))).sum() > entropy + 0.01


# --- samplers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("order", ["event", "ancestral", "confidence", "ar"])
def test_a_sample_does_not_depend_on_how_many_are_drawn(run, order):
    """Code k follows from (seed, k): the same alone, among many, and in a later part."""
    sampler = SAMPLER | {"order": order}

    def draw(count, first=0):
        return prior.sample_codes(tiny(order == "ar"), count, sampler, run, seed=3, first=first)[0]

    many = draw(prior.BATCH + 20)
    assert torch.equal(draw(7), many[:7])
    assert torch.equal(draw(20, first=prior.BATCH), many[prior.BATCH:])
    assert not torch.equal(many[:20], many[prior.BATCH:])


@pytest.mark.parametrize("per_token", [1, 2])
def test_ar_samples_follow_the_likelihood(run, per_token):
    model = tiny(True, per_token=per_token)
    codes, calls = prior.sample_ar(model, 40_000, SAMPLER, run, rng())
    assert distance(codes, torch.exp(-prior.ar_nll(model, CODES, run) * L)) < 0.06
    assert (calls == L // per_token).all()


@pytest.mark.parametrize("sampler", [
    {"order": "event"}, {"order": "ancestral", "steps": 400},
    {"order": "ancestral", "steps": 100, "remask": 0.05, "remask_window": [0.2, 0.8]},
    {"order": "confidence", "order_noise": 1e6},
], ids=["event", "ancestral", "remasking", "confidence in random order"])
def test_one_by_one_samplers_follow_the_distribution_and_what_is_given(known, sampler):
    codes, calls = sample(known, hidden(30_000), **sampler)
    assert distance(codes, known.p) < 0.07 and (calls.max() <= L) == ("remask" not in sampler)
    given = hidden(20_000)
    given[:, [0, 3]] = torch.tensor([1, 2])
    codes, calls = sample(known, given, **sampler)
    assert (codes[:, 0] == 1).all() and (codes[:, 3] == 2).all()
    assert distance(codes, known.p * ((CODES[:, 0] == 1) & (CODES[:, 3] == 2))) < 0.06
    kept, calls = sample(known, CODES, **sampler)
    assert torch.equal(kept, CODES) and calls.sum() == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_ancestral_takes_at_most_one_call_a_position_and_reveals_as_scheduled(known, steps):
    _, calls = sample(known, hidden(4000), order="ancestral", steps=steps)
    assert calls.max() <= min(steps, L) and calls.min() >= 1
    expected = steps * (1 - (1 - 1 / steps) ** L)  # steps in which one of L positions or more is revealed
    assert abs(calls.double().mean() - expected) < 0.06


def test_confidence_reveals_the_surest_position_first(known):
    model = Known(1e-12 + (CODES[:, 2] == 1).double())  # position 2 is certain, the others are not
    sample(model, hidden(20), order="confidence", order_noise=0.0)
    assert (model.asked[1][:, 2] == 1).all() and (model.asked[1] == V).sum() == 20 * 3
    assert (sample(known, hidden(50), order="confidence", per_step=3)[1] == 2).all()


def redraw(model, codes, rounds, log_weights=None):
    """prior.redraw_codes of one position a round: Gibbs sampling."""
    return prior.redraw_codes(model, codes, SAMPLER | {"rounds": rounds}, FakeRun(), rng(1), log_weights)


def test_redrawing_keeps_the_distribution_and_walks_to_it(known):
    begin = CODES[torch.multinomial(known.p, 20_000, replacement=True, generator=rng(3))]
    kept = redraw(known, begin, 3)
    assert distance(kept, known.p) < 0.08 and not torch.equal(kept, begin)
    p = torch.full((81,), 1e-9, dtype=torch.float64)
    p[[0, 80]] = 0.5  # only 0000 and 2222 are codes: a mixture of them walks to one of them
    walked = redraw(Known(p), torch.tensor([[0, 0, 0, 2], [2, 0, 2, 2]]).repeat(50, 1), 150)
    assert ((walked == 0).all(1) | (walked == 2).all(1)).float().mean() > 0.95


def test_weights_forbid_values_and_redrawing_follows_prior_times_weights(known):
    weights = torch.rand(L, V, generator=rng(5))
    weights[[0, 2, 2], [1, 0, 2]] = 0
    log_weights = weights.log().expand(20_000, L, V)
    codes, _ = sample(known, hidden(20_000), log_weights)
    assert not (codes[:, 0] == 1).any() and (codes[:, 2] == 1).all()
    codes = redraw(known, codes, 40, log_weights)
    assert distance(codes, known.p * weights[torch.arange(L), CODES].prod(1)) < 0.05


@pytest.mark.parametrize("temperature, nucleus, expected", [
    (1.0, 1.0, [0.05, 0.3, 0.15, 0.5]), (0.5, 1.0, [0.0068, 0.2466, 0.0616, 0.6849]),
    (1.0, 0.75, [0, 0.375, 0, 0.625]), (0.0, 1.0, [0, 0, 0, 1]), (1.0, 0.0, [0, 0, 0, 1])])
def test_values_are_drawn_by_temperature_and_nucleus(temperature, nucleus, expected):
    p = torch.tensor([0.05, 0.3, 0.15, 0.5])
    u = torch.rand(20_000, generator=rng(), dtype=torch.float64)
    values, log_p = prior.draw_values((p.log() + 2).expand(20_000, 4), temperature, nucleus, u)
    assert (torch.bincount(values, minlength=4) / 20_000 - torch.tensor(expected)).abs().max() < 0.02
    assert torch.allclose(log_p.exp(), p[values].double(), atol=1e-6)


@pytest.mark.parametrize("nucleus", [1.0, 0.95])
def test_forbidden_values_are_not_drawn_even_at_the_ends(nucleus):
    """At u = 0 and 1, which quotients round to, where a sum that is off by rounding would reach them."""
    p = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.7, 0.0])
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    values, _ = prior.draw_values((p * 3).log().expand(2, 6), 1.0, nucleus, u)
    assert values[0] in (1, 2) and values[1] == 4


# --- a device without float64 -----------------------------------------------------------------------------

MPS = torch.device("mps")


class OnMPS(torch.Tensor):
    """A tensor that stands for one on an MPS device; in truth it is on the CPU."""
    device = MPS
    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendMPS(TorchFunctionMode):
    """Inside, tensors can be made on a device "mps" and moved there. What is computed from them is there too,
    may not be float64, and not come from tensors of both devices (but for indices)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        mixed = len({x.device for x in tensors if x.ndim}) > 1
        assert not mixed or function is torch.Tensor.__getitem__, f"two devices in {function}"
        devices = [x for x in leaves if isinstance(x, torch.device)] or [x.device for x in tensors]
        there = MPS in devices and function is not torch.Tensor.cpu

        def to_cpu(x):
            if isinstance(x, OnMPS):
                return x.as_subclass(torch.Tensor)
            return torch.device("cpu") if isinstance(x, torch.device) else x

        def to_mps(x):
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), f"float64 from {function}"
            return x.as_subclass(OnMPS) if isinstance(x, torch.Tensor) else x

        args, kwargs = tree_map(to_cpu, (args, kwargs or {}))
        result = function(*args, **kwargs)
        return tree_map(to_mps, result) if there else result


def test_sampling_and_bits_are_the_same_on_a_device_without_float64(known):
    def results(device):
        run = FakeRun()
        run.device = device
        model = tiny(True)
        found = []
        for order in ("event", "ancestral", "confidence"):
            sampler = SAMPLER | {"order": order, "nucleus": 0.9}
            found += prior.sample_masked(known, hidden(200), sampler, run, rng(), torch.ones(200, L, V))
        for module in model.modules():
            for values in (module._parameters, module._buffers):
                values |= {name: x.detach().to(device) for name, x in values.items() if x is not None}
        found += prior.sample_ar(model, 50, SAMPLER, run, rng())
        return found + [torch.tensor(prior.bits_per_token(network, CODES, run)) for network in (known, model)]

    expected = results(torch.device("cpu"))
    with PretendMPS():
        with pytest.raises(AssertionError, match="float64"):
            torch.ones(1, device=MPS).double()
        found = results(MPS)
    assert len(found) == 10 and all(torch.equal(a, b) for a, b in zip(found, expected))


# --- training ---------------------------------------------------------------------------------------------

def test_a_flag_that_came_later_does_not_stop_a_run(trained, tmp_path, monkeypatch):
    """A checkpoint that does not know it counts as trained with its default."""
    _, words = prepare(trained, tmp_path, "prior-ar")
    with stopped_after(3, monkeypatch):
        call(*words)
    add_flags = prior.add_flags

    def add_more_flags(parser):
        add_flags(parser)
        parser.add_argument_group("model").add_argument("--my-idea", type=float, default=0.0)

    monkeypatch.setattr(prior, "add_flags", add_more_flags)
    refuse(*words, "--my-idea", "0.5", words=["my_idea 0.0 → 0.5"])
    call(*words)
    whole = results(trained, "prior-ar")
    assert whole["step"] == 6
    same(results(tmp_path, "prior-ar"), whole)


ELSEWHERE = """
import os, signal, sys
import torch._dynamo, torch.distributed, torch.utils.flop_counter  # which ask for the system themselves
for name in ("fcntl", "resource"):
    sys.modules[name] = None
del os.sched_getaffinity, signal.SIGHUP, signal.SIGCHLD
sys.platform = "win32"
import data, launch, prior
data.Run.stopping = launch.stop_after(2)
for time in ("first", "second"):
    try:
        data.run_script(lambda: prior.main(sys.argv[1:]))
    except SystemExit as stopped:
        print(f"{time}: {stopped.code}")
"""


def test_a_prior_trains_and_resumes_without_what_linux_alone_has(trained, tmp_path):
    """No locks, no limits, fewer signals."""
    _, (_, *flags) = prepare(trained, tmp_path, "prior-ar")
    words = [sys.executable, "-c", ELSEWHERE, *map(str, flags)]
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "stopped at step 2 of 6" in done.stderr, done.stderr
    assert "first: 143" in done.stdout and "second" not in done.stdout
    assert weights(tmp_path, "prior-ar")["step"] == 6
