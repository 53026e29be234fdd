import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from glintru_rec.losses import LogUniform, NegativeSampler, Popularity, Uniform, full_softmax, sampled_softmax, softmax


def draw(num_targets=7, num_items=23, width=5, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    query = scale * torch.randn(num_targets, width, generator=generator, dtype=torch.float64)
    items = torch.randn(num_items, width, generator=generator, dtype=torch.float64)
    target_ids = torch.randint(num_items, (num_targets,), generator=generator)
    return query, items, target_ids


def naive(query, items, target_ids, negative_ids, log_q, temperature):
    """-log of the target's share of exp(score), one target after another."""
    losses = []
    for q, target in zip(query, target_ids.tolist()):
        positive = math.exp((q @ items[target]).item() / temperature)
        total = positive
        for j, negative in enumerate(negative_ids.tolist()):
            if negative != target:
                total += math.exp((q @ items[negative]).item() / temperature - log_q[j])
        losses.append(-math.log(positive / total))
    return torch.tensor(losses, dtype=torch.float64)


def sampled(query, items, target_ids, negative_ids, log_q, temperature=1.0):
    return sampled_softmax(query, items[target_ids], items[negative_ids], target_ids, negative_ids, log_q, temperature)


def full(query, items, target_ids, *options, **named):
    return full_softmax(query, items[target_ids], items, *options, **named)


# --- sampled


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sampled_over_the_whole_catalog_is_exact(temperature):
    query, items, target_ids = draw()
    query.requires_grad_()
    items.requires_grad_()
    loss = sampled(query, items, target_ids, torch.arange(23), 0.0, temperature)
    exact = functional.cross_entropy(query @ items.t() / temperature, target_ids, reduction="none")
    assert_close(loss, exact, rtol=1e-12, atol=1e-12)
    weights = torch.rand(7, dtype=torch.float64)
    ours = torch.autograd.grad((loss * weights).sum(), [query, items])
    assert_close(ours, torch.autograd.grad((exact * weights).sum(), [query, items]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sampled_equals_the_naive_loop(temperature):
    query, items, target_ids = draw()
    negative_ids = torch.randint(23, (40,), generator=torch.Generator().manual_seed(1))
    assert bool((target_ids.unsqueeze(1) == negative_ids).any())  # there are accidental hits
    log_q = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for given, used in ((log_q, log_q.tolist()), (-0.7, [-0.7] * 40), (None, [0.0] * 40)):
        loss = sampled(query, items, target_ids, negative_ids, given, temperature)
        expected = naive(query, items, target_ids, negative_ids, used, temperature)
        assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_logq_by_hand():
    """Scores 0 and ln 2, drawn with an expected count of 1/2: exp(s) counts twice."""
    query, items = torch.tensor([[math.log(2.0)]]), torch.tensor([[0.0], [1.0]])
    arguments = (query, items, torch.tensor([0]), torch.tensor([1]))
    assert_close(sampled(*arguments, None), torch.tensor([math.log(1 + 2)]))
    assert_close(sampled(*arguments, math.log(0.5)), torch.tensor([math.log(1 + 4)]))
    assert_close(sampled(*arguments, torch.tensor([math.log(0.5)])), torch.tensor([math.log(1 + 4)]))


@pytest.mark.parametrize("with_aim", [False, True])
def test_classic_correction_is_cross_entropy_over_corrected_scores(with_aim):
    query, items, target_ids = draw()
    generator = torch.Generator().manual_seed(3)
    negative_ids = torch.tensor([v for v in range(23) if v not in target_ids])
    log_q, positive_log_q = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (len(negative_ids), 7))
    positive, aim = items[target_ids], items[target_ids] if with_aim else None
    scores = torch.cat([(query * positive).sum(1, keepdim=True), query @ items[negative_ids].t()], dim=1)
    corrected = scores - torch.cat([positive_log_q.unsqueeze(1), log_q.expand(7, -1)], dim=1)
    exact = functional.cross_entropy(corrected, torch.zeros(7, dtype=torch.int64), reduction="none")
    arguments = (query, positive, items[negative_ids], target_ids, negative_ids, log_q, 1.0, aim, positive_log_q)
    assert_close(sampled_softmax(*arguments), exact, rtol=1e-12, atol=1e-12)


def test_accidental_hits_change_nothing():
    query, items, target_ids = draw(num_targets=1)
    items.requires_grad_()
    others = torch.tensor([v for v in range(23) if v != target_ids.item()])
    plain = sampled(query, items, target_ids, others, -0.5)
    hit = sampled(query, items, target_ids, torch.cat([others[:4], target_ids, others[4:], target_ids]), -0.5)
    assert_close(hit, plain, rtol=1e-13, atol=1e-13)
    assert_close(*[torch.autograd.grad(loss.sum(), items) for loss in (hit, plain)], rtol=1e-13, atol=1e-13)


def test_nothing_but_accidental_hits_is_a_loss_of_zero():
    query, items, target_ids = draw(num_targets=1)
    query.requires_grad_()
    for negative_ids in (target_ids, target_ids[:0]):
        loss = sampled(query, items, target_ids, negative_ids, None)
        assert_close(loss, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-14)
        (gradient,) = torch.autograd.grad(loss.sum(), query)
        assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_sampled_sum_is_unbiased():
    """exp(loss + s⁺) - exp(s⁺) is the estimate of the sum over all items but the target; within 5 sigma of it."""
    query, items, target_ids = draw(num_targets=5, num_items=40)
    generator = torch.Generator().manual_seed(4)
    scores = query @ items.t()
    positive = scores.gather(1, target_ids.unsqueeze(1)).squeeze(1)
    truth = scores.exp().sum(1) - positive.exp()
    repetitions, num_negatives = 3000, 8
    estimates = torch.stack(
        [
            (sampled(query, items, target_ids, drawn, math.log(num_negatives / 40)) + positive).exp() - positive.exp()
            for drawn in Uniform(40).draw(repetitions * num_negatives, generator).split(num_negatives)
        ]
    )
    sigma = estimates.std(0) / repetitions**0.5
    assert bool((sigma < 0.05 * truth).all())  # sharp enough to tell
    assert bool(((estimates.mean(0) - truth).abs() < 5 * sigma).all())


def test_sampled_converges_to_the_exact_loss():
    """Its error is the standard deviation of the log of the sum, which falls as 1/sqrt(K); uncorrected it stays off."""
    query, items, target_ids = draw(num_targets=50, num_items=60)
    scores = query @ items.t()
    exact = functional.cross_entropy(scores, target_ids, reduction="none")
    summands = scores.exp().scatter(1, target_ids.unsqueeze(1), 0.0)  # the target itself is masked
    relative = summands.std(1, correction=0) * 60 / scores.exp().sum(1)  # of the sum, from one draw
    generator = torch.Generator().manual_seed(5)

    def error(num_negatives, corrected=True):
        log_q = math.log(num_negatives / 60) if corrected else None
        drawn = [Uniform(60).draw(num_negatives, generator) for _ in range(30)]
        losses = torch.stack([sampled(query, items, target_ids, ids, log_q) for ids in drawn])
        return (losses - exact).square().mean().sqrt().item()

    for num_negatives in (640, 2560, 10_240):
        expected = relative.square().mean().sqrt().item() / num_negatives**0.5
        assert 0.7 * expected < error(num_negatives) < 1.3 * expected
    assert error(10_240, corrected=False) > 1


def test_sampled_gradcheck():
    query, items, target_ids = draw(num_targets=4, num_items=9)
    negative_ids = torch.tensor([0, 3, 3, 8, 5])
    inputs = [query.requires_grad_(), items[target_ids].requires_grad_(), items[negative_ids].requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: sampled_softmax(*x, target_ids, negative_ids, -0.4, 0.7), inputs)


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_large_scores_stay_finite(loss):
    query, items, target_ids = [x.float() if x.is_floating_point() else x for x in draw(scale=1e4)]
    query.requires_grad_()
    losses = full(query, items, target_ids) if loss == "full" else sampled(query, items, target_ids, torch.arange(23), 0.0)
    assert bool(losses.isfinite().all())
    (gradient,) = torch.autograd.grad(losses.sum(), query)
    assert bool(gradient.isfinite().all())


def test_no_targets():
    query, items, _ = draw(num_targets=0)
    none = torch.empty(0, dtype=torch.int64)
    for losses in (
        sampled(query.requires_grad_(), items.requires_grad_(), none, torch.arange(4), -1.0),
        full(query, items, none),
    ):
        assert losses.shape == (0,)
        gradients = torch.autograd.grad(losses.sum(), [query, items])
        assert gradients[0].shape == (0, 5)
        assert torch.equal(gradients[1], torch.zeros_like(items))


# --- full


@pytest.fixture(params=[(1024, 16384), (3, 4), (7, 5), (1, 1)], ids=str)
def blocks(request, monkeypatch):
    """Blocks of logits: one, non-divisible, divisible by the targets alone, single logits."""
    for suffix in ("", "_AT_ONCE"):
        monkeypatch.setattr(softmax, f"ROWS{suffix}", request.param[0])
        monkeypatch.setattr(softmax, f"COLUMNS{suffix}", request.param[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize(("num_targets", "num_items"), [(7, 23), (1, 1), (6, 4), (1, 9)])
def test_full_equals_cross_entropy(num_targets, num_items, temperature):
    query, items, target_ids = draw(num_targets, num_items)
    leaves = [query.requires_grad_(), items.requires_grad_()]
    loss = full(query, items, target_ids, temperature)
    exact = functional.cross_entropy(query @ items.t() / temperature, target_ids, reduction="none")
    assert_close(loss, exact, rtol=1e-12, atol=1e-12)
    for weights in (torch.ones_like(loss), torch.linspace(-1, 2, num_targets, dtype=torch.float64)):
        ours = torch.autograd.grad((loss * weights).sum(), leaves, retain_graph=True)
        theirs = torch.autograd.grad((exact * weights).sum(), leaves, retain_graph=True)
        assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("blocks")
def test_full_gradcheck():
    query, items, target_ids = draw(num_targets=4, num_items=9)
    target_ids[1] = target_ids[0]  # a target may repeat
    inputs = [query.requires_grad_(), items.requires_grad_()]
    assert torch.autograd.gradcheck(lambda query, items: full(query, items, target_ids, 0.7), inputs)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_aim_is_the_mean_loss_of_several_targets(temperature):
    """-log softmax is linear in the target's vector, so the loss at a weighted mean is the weighted mean of the losses."""
    query, items, first = draw()
    second, negatives, weight = first.flip(0), torch.arange(23), 0.7
    aim = weight * items[first] + (1 - weight) * items[second]
    expected = weight * full(query, items, first, temperature) + (1 - weight) * full(query, items, second, temperature)
    assert_close(full_softmax(query, aim, items, temperature), expected, rtol=1e-12, atol=1e-12)
    sampled_loss = sampled_softmax(query, items[first], items, first, negatives, 0.0, temperature, aim)
    assert_close(sampled_loss, expected, rtol=1e-12, atol=1e-12)


def test_full_in_bf16():
    """Within bfloat16's rounding of the factors (2^-9 relative each) of the exact loss, and precision is put back."""
    torch.manual_seed(0)
    query, items = torch.randn(300, 64, requires_grad=True), torch.randn(5000, 64, requires_grad=True)
    target_ids = torch.randint(5000, (300,))
    exact = full(query, items, target_ids)
    rounded = full(query, items, target_ids, precision="bf16")
    assert_close(rounded, exact, rtol=0, atol=2**-8 * 64)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "amx_bf16" in flags:
        assert not torch.equal(rounded, exact)  # it was bf16
    ours, theirs = (torch.autograd.grad(loss.sum(), [query, items]) for loss in (rounded, exact))
    for own, true in zip(ours, theirs):
        assert (own - true).norm() < 0.02 * true.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.parametrize("at_once", [False, True])
def test_full_never_holds_all_logits(monkeypatch, at_once):
    monkeypatch.setattr(softmax, "ROWS", 4)
    monkeypatch.setattr(softmax, "COLUMNS", 8)
    monkeypatch.setattr(softmax, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(softmax, "COLUMNS_AT_ONCE", 50 if at_once else 49)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    query, items, target_ids = draw(num_targets=40, num_items=50, width=2)
    with Largest():
        full(query.requires_grad_(), items.requires_grad_(), target_ids).sum().backward()
    assert largest == max(query.numel(), items.numel())  # 100, where the logits are 2000


def test_full_in_float32():
    query, items, target_ids = draw(num_targets=64, num_items=300, width=32)
    truth = functional.cross_entropy(query @ items.t(), target_ids, reduction="none")
    plain = functional.cross_entropy(query.float() @ items.float().t(), target_ids, reduction="none")
    ours = full(query.float(), items.float(), target_ids)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 1e-6


# --- negatives

COUNTS = torch.tensor([500, 0, 90, 33, 0, 12, 12, 5, 3, 3, 2, 1, 1, 0])  # V = 14


def share(counts):
    return counts.double() / counts.sum()


SAMPLERS = {
    "uniform": NegativeSampler(Uniform(14), 6),
    "log_uniform": NegativeSampler(LogUniform(14), 6),
    "popularity": NegativeSampler(Popularity(COUNTS), 6),
    "popularity^0.5": NegativeSampler(Popularity(COUNTS, 0.5), 6),
    "popularity^0": NegativeSampler(Popularity(COUNTS, 0.0), 6),
    "in_batch": NegativeSampler(targets=Popularity(COUNTS)),
    "mixed": NegativeSampler(Uniform(14), 6, Popularity(COUNTS), 4),
    "mixed, of all targets": NegativeSampler(Uniform(14), 6, Popularity(COUNTS), 9),
}
EXPECTED = {
    "uniform": torch.full((14,), 6 / 14),
    "log_uniform": torch.tensor([6 * math.log((i + 2) / (i + 1)) / math.log(15) for i in range(14)]),
    "popularity": 6 * share(COUNTS),
    "popularity^0.5": 6 * share(COUNTS.double().sqrt()),
    "popularity^0": 6 * share(COUNTS > 0),
    "in_batch": 8 * share(COUNTS),
    "mixed": 6 / 14 + 4 * share(COUNTS),
    "mixed, of all targets": 6 / 14 + 8 * share(COUNTS),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_negatives_come_as_often_as_log_q_says(name):
    """Over many batches of 8 targets, within 5 sigma; what log_q says is the truth; what has no chance never comes."""
    torch.manual_seed(0)
    repetitions, expected = 4000, EXPECTED[name].double()
    drawn = torch.zeros(14, dtype=torch.float64)
    for target_ids in torch.multinomial(COUNTS.double(), 8 * repetitions, replacement=True).split(8):
        ids, log_q, target_log_q = SAMPLERS[name].draw(target_ids)
        assert (ids.dtype, log_q.dtype, target_log_q.dtype) == (torch.int64, torch.float32, torch.float32)
        assert_close(log_q.double().exp(), expected[ids], rtol=1e-6, atol=0)
        assert_close(target_log_q.double().exp(), expected[target_ids], rtol=1e-6, atol=0)
        drawn += torch.bincount(ids, minlength=14)
    # The draws of one sample are at most as spread as independent ones, whose variance is their expected number or less.
    sigma = (expected / repetitions).sqrt()
    assert bool(((drawn / repetitions - expected).abs() <= 5 * sigma).all())
    assert torch.equal(drawn == 0, expected == 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_negatives_follow_the_seed(name):
    target_ids = torch.tensor([0, 2, 3, 5, 6, 7, 8, 9])
    torch.manual_seed(3)
    first, other = SAMPLERS[name].draw(target_ids), SAMPLERS[name].draw(target_ids)
    torch.manual_seed(3)
    again = SAMPLERS[name].draw(target_ids)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.log_q, again.log_q)
    assert name == "in_batch" or not torch.equal(first.ids, other.ids)


def test_negatives_beside_an_empty_batch():
    none = torch.empty(0, dtype=torch.int64)
    assert [len(part) for part in SAMPLERS["in_batch"].draw(none)] == [0, 0, 0]
    ids, log_q, _ = SAMPLERS["mixed"].draw(none)
    assert ids.shape == (6,)
    assert_close(log_q, torch.full((6,), math.log(6 / 14)))


@pytest.mark.parametrize("distribution", [Uniform(7), LogUniform(7), Popularity(torch.arange(7)), LogUniform(1), Uniform(1)])
def test_probabilities_sum_to_one(distribution):
    total = distribution.log_p(torch.arange(getattr(distribution, "num_items", 7))).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


ODD_COUNTS = {
    "one item": [3],
    "equal": [2, 2, 2],
    "without some": [0, 3, 0, 0, 1, 2, 0],
    "one of many": [0] * 9 + [1] + [0] * 20,
    "one above all": [1] * 50 + [10**9],
    "falling": [10**6 // (i + 1) for i in range(300)],
    "by chance": torch.randint(9, (999,), generator=torch.Generator().manual_seed(0)).tolist(),
}


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("name", ODD_COUNTS)
def test_popularity_fills_its_places(name, power):
    """Room of an item in all places = its probability, in whole numbers: what is drawn is what log_p says, exactly."""
    counts = torch.tensor(ODD_COUNTS[name])
    distribution = Popularity(counts, power)
    (kept, alias), room = distribution.places, distribution.room
    assert bool(((kept >= 0) & (kept <= room)).all())
    drawn = kept.index_add(0, alias, room - kept)
    assert torch.equal(drawn == 0, counts == 0)
    share = counts.double() ** power
    assert_close(drawn.double() / (room * len(counts)), share / share.sum(), rtol=1e-9, atol=0)
    log_p = distribution.log_p(torch.arange(len(counts)))
    assert_close(log_p, drawn.double().log() - math.log(room * len(counts)), rtol=0, atol=1e-12)


def test_uniform_draws_are_even_in_a_large_catalog():
    """32 random bits modulo 3 * 2^26 would give its first third a share of 22/64."""
    drawn = Uniform(3 * 2**26).draw(200_000, torch.Generator().manual_seed(0))
    share = (drawn < 2**26).double().mean().item()
    assert abs(share - 1 / 3) < 4 * (2 / 9 / 200_000) ** 0.5 < (22 / 64 - 1 / 3) / 2


def test_popularity_keeps_the_rarest():
    """One event among 10^12 has its chance, and powers neither overflow nor lose an item."""
    counts = torch.tensor([10**12, 1, 0])
    assert Popularity(counts).log_p(torch.tensor([1])).item() == pytest.approx(math.log(1e-12), abs=0.01)
    assert bool(Popularity(counts, 40.0).log_p(torch.tensor([0, 1])).isfinite().all())
    assert Popularity(counts).log_p(torch.tensor([2])).item() == -math.inf


@pytest.mark.parametrize("make", [Uniform, LogUniform])
def test_draws_from_a_very_large_catalog(make):
    drawn = make(2**40).draw(10_000, torch.Generator().manual_seed(0))
    assert 2**39 < drawn.max() < 2**40
    assert drawn.min() >= 0
    assert bool((drawn[drawn > 2**30] % 2 == 1).any())  # float32 would have no odd ones there
    in_upper_half = (drawn >= 2**39).double().mean().item()
    truth = 0.5 if make is Uniform else math.log(2) / math.log(2**40)
    assert abs(in_upper_half - truth) < 5 * (truth * (1 - truth) / 10_000) ** 0.5


def test_log_uniform_tells_neighbours_apart_in_a_large_catalog():
    """P(one of the next hundred) from the sum of log_p against the closed form of the cumulative distribution."""
    distribution = LogUniform(10**9)
    for start in (0, 10**6, 10**9 - 100):
        mass = distribution.log_p(torch.arange(start, start + 100)).exp().sum().item()
        assert mass == pytest.approx(math.log1p(100 / (start + 1)) / math.log(10**9 + 1), rel=1e-9)
