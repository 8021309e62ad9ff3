"""The prior against mathematics: every code of L = 4 positions and V = 3 values can be listed."""
import itertools
import math

import data
import prior
import pytest
import torch

L, V = 4, 3
CODES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # all 81
SAMPLER = {"temperature": 1.0, "nucleus": 1.0, "order": "event", "per_step": 1, "order_noise": 1.0, "steps": 64, "remask": 0.0,
           "remask_window": [0.3, 0.55]}


def tiny(causal, tables="position", seed=0):
    torch.manual_seed(seed)
    model = prior.Prior(L, V, 16, 2, 2, 0.0, causal, tables).eval()
    torch.nn.init.normal_(model.ff_out, std=0.5)
    return model


class Known(torch.nn.Module):
    """A masked "network" that knows a distribution over the 81 codes and answers with its exact conditionals."""

    def __init__(self, p):
        super().__init__()
        self.p, self.L, self.V, self.causal, self.asked = p, L, V, False, []

    def forward(self, codes):
        self.asked.append(codes.clone())
        fits = ((codes[:, None] == CODES) | (codes[:, None] == V)).all(2).double() * self.p  # (B, 81)
        one_hot = torch.nn.functional.one_hot(CODES, V).double()  # (81, L, V)
        return torch.einsum("bc,clv->blv", fits / fits.sum(1, keepdim=True), one_hot).clamp(min=1e-30).log()


@pytest.fixture
def known():
    p = torch.rand(81, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4
    return Known(p / p.sum())


def frequencies(codes):
    return torch.bincount((codes * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double() / len(codes)


@pytest.mark.parametrize("tables", ["position", "shared"])
def test_ar_likelihoods_of_all_codes_sum_to_one(run, tables):
    model = tiny(True, tables)
    with torch.no_grad():
        total = torch.exp(-prior.ar_nll(model, CODES, run).double() * L).sum()
    assert abs(total - 1) < 1e-5


def test_ar_is_causal(run):
    model = tiny(True)
    a, b = CODES[:1].clone(), CODES[:1].clone()
    for at in range(L):
        b = a.clone()
        b[0, at] = 2
        with torch.no_grad():
            same = (model(a) == model(b)).all(2)[0]
        assert same[:at + 1].all() and (at == L - 1 or not same[at + 1:].any())


def test_ar_cache_equals_the_full_forward(run):
    for tables in ("position", "shared"):
        model, codes = tiny(True, tables), CODES[[5, 40, 77]]
        for block in model.blocks:  # gains that are not 1 must reach the packed weights
            torch.nn.init.uniform_(block.attn_norm.weight, 0.5, 2), torch.nn.init.uniform_(block.ff_norm.weight, 0.5, 2)
        torch.nn.init.uniform_(model.ln_f.weight, 0.5, 2)
        decoder = prior.Decoder(model, 3, run)
        with torch.no_grad():
            stepwise = torch.stack([decoder(codes[:, at - 1], at) for at in range(L)], 1)
            assert torch.allclose(stepwise, model(codes), atol=1e-5)


def test_a_cache_that_grows_equals_the_full_forward(run):
    """More positions than the cache starts with: it doubles, and ends at a length that is no power of two."""
    torch.manual_seed(0)
    model = prior.Prior(150, 7, 16, 2, 2, 0.0, True, "shared").eval()
    torch.nn.init.normal_(model.ff_out, std=0.5)
    codes, decoder = torch.randint(0, 7, (2, 150)), prior.Decoder(model, 2, run)
    with torch.no_grad():
        stepwise = torch.stack([decoder(codes[:, at - 1], at) for at in range(150)], 1)
        assert torch.allclose(stepwise, model(codes), atol=1e-4) and decoder.cache.shape[3] == 150


@pytest.mark.parametrize("order", ["event", "ancestral", "confidence", "ar"])
def test_a_sample_does_not_depend_on_how_many_are_drawn(run, order):
    """Code k follows from (seed, k): the same alone, among many, and where another process draws a later part."""
    model, sampler = tiny(order == "ar"), {**SAMPLER, "order": order}
    many = prior.sample_codes(model, prior.BATCH + 20, sampler, run, seed=3)[0]
    assert torch.equal(prior.sample_codes(model, 7, sampler, run, seed=3)[0], many[:7])
    assert torch.equal(prior.sample_codes(model, 20, sampler, run, seed=3, first=prior.BATCH)[0], many[prior.BATCH:])
    assert not torch.equal(many[:20], many[prior.BATCH:])


def test_ar_samples_follow_the_likelihood(run):
    model = tiny(True)
    codes, calls = prior.sample_ar(model, 40_000, SAMPLER, run, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = torch.exp(-prior.ar_nll(model, CODES, run).double() * L)
    assert (frequencies(codes) - p).abs().sum() < 0.06 and (calls == L).all()


def exact_bound(model, run):
    """Bound (1) in nats per token for all 81 codes, by listing every set of hidden positions."""
    total = torch.zeros(81, dtype=torch.float64)
    for k in range(1, L + 1):
        sets = list(itertools.combinations(range(L), k))
        for hidden in sets:
            hidden = list(hidden)
            visible = CODES.clone()
            visible[:, hidden] = V
            with torch.no_grad():
                log_p = model(visible).double().log_softmax(-1).gather(2, CODES[..., None])[..., 0]
            total -= log_p[:, hidden].sum(1) / k / len(sets) / L
    return total


def test_masked_estimate_is_unbiased_for_the_bound_of_every_code(run):
    model = tiny(False)
    bound, draws = exact_bound(model, run), 3000
    generator = torch.Generator().manual_seed(0)
    codes = CODES[[0, 33, 80]].repeat_interleave(draws, 0)
    with torch.no_grad():
        u, scores = torch.rand(len(codes), generator=generator), torch.rand(len(codes), L, generator=generator)
        estimate = prior.masked_nll(model, codes, V, u, scores, run)
    assert (estimate.view(3, draws).mean(1).double() - bound[[0, 33, 80]]).abs().max() < 0.03


def test_bound_is_above_the_truth_and_tight_for_exact_conditionals(run, known):
    """Averaged over the data, the bound of a network is at least the entropy, and equals it when its conditionals are exact."""
    entropy = -(known.p * known.p.log()).sum() / L
    assert abs((known.p * exact_bound(known, run)).sum() - entropy) < 1e-6
    assert (known.p * exact_bound(tiny(False), run)).sum() > entropy + 0.01


def test_hide_hides_exactly_k_positions_evenly():
    u, scores = torch.arange(4000) / 4000, torch.rand(4000, L, generator=torch.Generator().manual_seed(0))
    visible, hidden, k = prior.hide(CODES[:1].expand(4000, L), V, u, scores)
    assert torch.equal(hidden.sum(1), k.long()) and torch.equal(torch.bincount(k.long()), torch.tensor([0, 1000, 1000, 1000, 1000]))
    assert (hidden.float().mean(0) - 0.625).abs().max() < 0.03 and ((visible == V) == hidden).all()


@pytest.mark.parametrize("change", [{"order": "event"}, {"order": "ancestral", "steps": 400}, {"order": "confidence", "order_noise": 1e6}],
                         ids=["event", "ancestral", "confidence in random order"])
def test_one_by_one_samplers_follow_the_distribution(run, known, change):
    codes, calls = prior.sample_masked(known, torch.full((30_000, L), V), {**SAMPLER, **change}, run, torch.Generator().manual_seed(0))
    assert (frequencies(codes) - known.p).abs().sum() < 0.06
    assert calls.max() <= L


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_ancestral_takes_at_most_one_call_a_position_and_reveals_as_scheduled(run, known, steps):
    _, calls = prior.sample_masked(known, torch.full((4000, L), V), {**SAMPLER, "order": "ancestral", "steps": steps}, run, torch.Generator().manual_seed(0))
    assert calls.max() <= min(steps, L) and calls.min() >= 1
    expected = steps * (1 - (1 - 1 / steps) ** L)  # steps in which at least one of L positions, spread evenly, is revealed
    assert abs(calls.double().mean() - expected) < 0.06


def test_several_positions_a_call(run, known):
    for order in ("event", "confidence"):
        codes, calls = prior.sample_masked(known, torch.full((50, L), V), {**SAMPLER, "order": order, "per_step": 3}, run, torch.Generator())
        assert (calls == 2).all() and codes.max() < V


def test_confidence_reveals_the_surest_position_first(run):
    p = torch.full((81,), 1e-12, dtype=torch.float64)
    p[CODES[:, 2] == 1] = 1.0  # position 2 is certain, the others are not
    model = Known(p / p.sum())
    prior.sample_masked(model, torch.full((20, L), V), {**SAMPLER, "order": "confidence", "order_noise": 0.0}, run, torch.Generator())
    assert (model.asked[1][:, 2] == 1).all() and (model.asked[1] == V).sum() == 20 * 3


def test_remasking_keeps_the_distribution_and_never_touches_given_positions(run, known):
    change = {"order": "ancestral", "steps": 100, "remask": 0.05, "remask_window": [0.2, 0.8]}
    codes, calls = prior.sample_masked(known, torch.full((20_000, L), V), {**SAMPLER, **change}, run, torch.Generator().manual_seed(0))
    assert (frequencies(codes) - known.p).abs().sum() < 0.08 and calls.double().mean() > L * 0.99
    given = torch.full((500, L), V)
    given[:, 1] = 2
    filled, _ = prior.sample_masked(known, given, {**SAMPLER, **change}, run, torch.Generator().manual_seed(0))
    assert (filled[:, 1] == 2).all()


@pytest.mark.parametrize("order", ["event", "ancestral", "confidence"])
def test_infilling_keeps_what_is_given_and_follows_the_conditional(run, known, order):
    given = torch.full((20_000, L), V)
    given[:, 0], given[:, 3] = 1, 2
    change = {"order": order, "order_noise": 1e6, "steps": 200}
    codes, calls = prior.sample_masked(known, given, {**SAMPLER, **change}, run, torch.Generator().manual_seed(0))
    assert (codes[:, 0] == 1).all() and (codes[:, 3] == 2).all() and calls.max() <= 2
    p = known.p * ((CODES[:, 0] == 1) & (CODES[:, 3] == 2))
    assert (frequencies(codes) - p / p.sum()).abs().sum() < 0.06
    full = CODES.clone()
    same, calls = prior.sample_masked(known, full, SAMPLER, run, torch.Generator())
    assert torch.equal(same, full) and calls.sum() == 0


def test_redrawing_keeps_the_distribution_and_walks_to_it(run, known):
    start = CODES[torch.multinomial(known.p, 20_000, replacement=True, generator=torch.Generator().manual_seed(3))]
    kept = prior.redraw_codes(known, start, 3, 0.25, SAMPLER, run, torch.Generator().manual_seed(0))
    assert (frequencies(kept) - known.p).abs().sum() < 0.08 and not torch.equal(kept, start)  # one position a round: exact Gibbs
    p = torch.full((81,), 1e-9, dtype=torch.float64)
    p[0] = p[80] = 0.5  # only 0000 and 2222 are codes: a mixture of them walks to one of them
    fixed = prior.redraw_codes(Known(p / p.sum()), torch.tensor([[0, 0, 0, 2], [2, 0, 2, 2]]).repeat(50, 1), 150, 0.25, SAMPLER, run, torch.Generator())
    assert ((fixed == 0).all(1) | (fixed == 2).all(1)).float().mean() > 0.95


def test_weights_forbid_values_and_redrawing_follows_prior_times_weights(run, known):
    weights = torch.rand(L, V, generator=torch.Generator().manual_seed(5)).double()
    weights[0, 1] = weights[2, 0] = weights[2, 2] = 0
    log_weights = weights.log().float().expand(20_000, L, V)
    codes, _ = prior.sample_masked(known, torch.full((20_000, L), V), SAMPLER, run, torch.Generator().manual_seed(0), log_weights)
    assert not (codes[:, 0] == 1).any() and (codes[:, 2] == 1).all()
    codes = prior.redraw_codes(known, codes, 40, 0.25, SAMPLER, run, torch.Generator().manual_seed(1), log_weights)
    p = known.p * weights[torch.arange(L), CODES].prod(1)
    assert (frequencies(codes) - p / p.sum()).abs().sum() < 0.05


def test_values_are_drawn_by_temperature_and_nucleus():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(20_000, 4)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = lambda t, n: torch.bincount(prior.draw_values(logits, t, n, u)[0], minlength=4) / 20_000
    assert (draw(1.0, 1.0) - p).abs().max() < 0.02
    assert (draw(0.5, 1.0) - p ** 2 / (p ** 2).sum()).abs().max() < 0.02
    assert (draw(1.0, 0.75) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.02
    assert draw(0.0, 1.0)[0] == 1 and draw(1.0, 0.0)[0] == 1
    last = logits.flip(1)  # the most likely value is not the first: nothing left over would read as value 0
    assert all((prior.draw_values(last, t, n, u)[0] == 3).all() for t, n in ((0.0, 1.0), (1.0, 0.0), (1.0, 0.4)))
    _, log_p = prior.draw_values(logits[:5], 1.0, 1.0, u[:5])
    assert log_p.exp().max() <= 0.5 + 1e-6


def test_forbidden_values_are_not_drawn_even_at_the_ends():
    """At u = 0 and just below 1, where a sum that is off by rounding would reach them."""
    p = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.7, 0.0])
    u = torch.tensor([0.0, 1 - 2.0 ** -53], dtype=torch.float64)
    for nucleus in (1.0, 0.95):
        values, _ = prior.draw_values((p * 3).log().expand(2, 6), 1.0, nucleus, u)
        assert values[0] in (1, 2) and values[1] == 4


def test_bits_per_token_of_uniform_codes(run):
    model = tiny(False)
    torch.nn.init.zeros_(model.ff_out)
    for causal in (False, True):
        model.causal = causal
        assert abs(prior.bits_per_token(model, CODES, run)[0] - math.log2(V)) < 1e-5


def test_flops_formula_counts_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    parser = data.make_parser("")
    data.add_training_flags(parser, 1, 4, 0.1, 0.0, 0)
    prior.add_flags(parser)
    args = data.parse(parser, {}, ["--kind", "masked", "--width", "64", "--depth", "3"])
    args.codes, args.values = 12, 10
    model = prior.build_prior(vars(args))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(4, 12, dtype=torch.long))
    assert abs(counter.get_total_flops() * 3 / prior.training_flops(args) - 1) < 0.02
