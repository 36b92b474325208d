"""Log-probs over the tokens that sampling kept, and of a second token: both ops against float64 autograd."""

import itertools

import pytest
import torch
from tolerance import check, check_rows

from fuserl.kernels.allowed import Allowed
from fuserl.kernels.head_outputs import head_of
from fuserl.kernels.linear_logprob import linear_logprob, reference
from fuserl.kernels.linear_policy_loss import linear_policy_loss

DEVICES = [pytest.param("cpu", "cpu"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
ROWS, WIDTH, VOCABULARY = 45, 24, 301
OUTPUTS = ("logprob", "entropy", "sum_sq_prob", "extra_logprob")
HEADS = {"plain": {}, "all": {"logit_scale": 1.3, "softcap": 9.0, "temperature": 0.8}}


def operands(dtype=torch.float32, device="cpu"):
    """Hidden states, a head of peaky logits, its bias; tokens, second tokens, a weight per output and row."""
    made = torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    ids, extra = torch.randint(VOCABULARY, (2, ROWS)).unbind()
    extra[::7] = ids[::7]
    return [x.to(dtype).to(device) for x in made], ids.to(device), extra.to(device), torch.randn(4, ROWS).to(device)


def lists(ids, extra, *, misses=True):
    """Ragged lists of 1 to 40 tokens, in no order; with `misses`, some lack the row's token or its second one."""
    rows = []
    for n in range(ROWS):
        among = {int(x) for x in torch.randint(VOCABULARY, (n % 40,))} | {int(ids[n]), int(extra[n])}
        if misses and n % 5 == 1:
            among -= {int(ids[n])} if n % 2 else {int(extra[n])}
        rows.append(torch.tensor(sorted(among, key=lambda v: v * 7919 % 301) or [VOCABULARY - 1]))
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return torch.cat(rows).to(ids.device), offsets


def total(out, weights, rows=slice(None)):
    each = [torch.where(g[rows] == 0, 0.0, getattr(out, name) * g[rows].to(out.logprob.dtype))
            for name, g in zip(OUTPUTS, weights, strict=True) if hasattr(out, name)]  # fmt: skip
    return torch.stack(each).sum(0)


def scored(leaves, ids, extra, weights, function=linear_logprob, **options):
    hidden, weight, bias = leaves
    out = function(hidden, weight, ids, outputs=OUTPUTS, extra_ids=extra, bias=bias, **options)
    total(out, weights).sum().backward()
    return {name: x.detach() for name, x in vars(out).items()}


def learnt(leaves, ids, extra, weights, **options):
    hidden, weight, bias = leaves
    given = {"outputs": OUTPUTS, "extra_ids": extra, "bias": bias, **options}
    value, out, _ = linear_policy_loss(hidden, weight, ids, lambda out, rows: total(out, weights, rows), **given)
    value.backward()
    return vars(out)


BOTH = pytest.mark.parametrize("run", [scored, learnt])


def gradients(run, made, *given, dtype=None, **options):
    leaves = [x.to(dtype or x.dtype).clone().requires_grad_() for x in made]
    return run(leaves, *given, **options), [leaf.grad for leaf in leaves]


def compare(run, made, *given, **options):
    dtype = made[0].dtype
    head = {name: options[name] for name in ("softcap", "logit_scale", "temperature", "allowed") if name in options}
    truth, true = gradients(scored, made, *given, dtype=torch.float64, function=reference, **head)
    plain, plainly = gradients(scored, made, *given, function=reference, **head)
    found, got = gradients(run, made, *given, **options)
    if dtype == torch.float64:
        for a, b in zip([*found.values(), *got], [*truth.values(), *true], strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12 * b[b.isfinite()].abs().max())
        return found
    for name, value in truth.items():
        check(name, found[name], value, plain[name], torch.float32)
    for name, a, b, c in zip(("d_hidden", "d_weight", "d_bias"), got, true, plainly, strict=True):
        assert b.norm() > 0
        check_rows(name, *(x[None] if x.dim() == 1 else x for x in (a, b, c)), dtype, torch.float32)
    return found


@pytest.mark.parametrize("device,backend", [*DEVICES, ("cpu", "reference")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("listed", [False, True], ids=["all tokens", "lists"])
@BOTH
def test_equals_float64(run, listed, head, dtype, device, backend):
    made, ids, extra, weights = operands(dtype, device)
    allowed = lists(ids, extra) if listed else None
    found = compare(run, made, ids, extra, weights, backend=backend, chunk=7, allowed=allowed, **HEADS[head])
    if listed:
        missing = [torch.arange(ROWS) % 10 == remainder for remainder in (1, 6)]
        for name, lost, other in (("logprob", missing[0], extra), ("extra_logprob", missing[1], ids)):
            lost = lost.to(device) & (ids != extra)
            assert (found[name][lost] == -torch.inf).all() and found[name][~lost & (other >= 0)].isfinite().any()


@BOTH
def test_is_the_softmax_of_the_kept_logits(run):
    made, ids, extra, weights = operands(torch.float64)
    listed, offsets = lists(ids, extra, misses=False)
    found, _ = gradients(run, made, ids, extra, weights, allowed=(listed, offsets), temperature=0.7)
    hidden, weight, bias = made
    for n in range(ROWS):
        kept = listed[offsets[n] : offsets[n + 1]]
        logp = ((hidden[n] @ weight[kept].T + bias[kept]) / 0.7).log_softmax(-1)
        assert torch.allclose(found["logprob"][n], logp[kept == ids[n]], rtol=1e-10)
        assert torch.allclose(found["extra_logprob"][n], logp[kept == extra[n]], rtol=1e-10)
        assert torch.allclose(found["entropy"][n], -(logp.exp() * logp).sum(), atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@BOTH
def test_all_tokens_in_every_list_change_no_bit(run, head):
    made, *given = operands()
    every = torch.arange(VOCABULARY).repeat(ROWS), VOCABULARY * torch.arange(ROWS + 1)
    whole, expected = gradients(run, made, *given, chunk=10, **HEADS[head])
    found, got = gradients(run, made, *given, chunk=10, allowed=every, **HEADS[head])
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("head", HEADS)
@BOTH
def test_a_token_that_its_row_may_not_choose_is_a_constant(run, head):
    made, ids, extra, weights = operands()
    barred = torch.stack([(ids + 1) % VOCABULARY, (ids + 2) % VOCABULARY], 1).flatten(), 2 * torch.arange(ROWS + 1)
    weights[1:] = 0.0  # of the log-prob alone
    found, got = gradients(run, made, ids, extra, weights, allowed=barred, **HEADS[head])
    assert (found["logprob"] == -torch.inf).all() and all((gradient == 0).all() for gradient in got)


@BOTH
def test_a_row_that_may_choose_one_token_is_certain(run):
    made, ids, _, weights = operands()
    weights[1:] = 0.0
    alone = ids, torch.arange(ROWS + 1)
    found, got = gradients(run, made, ids, ids, weights, allowed=alone, softcap=9.0)
    assert (found["logprob"] == 0).all() and (found["entropy"] == 0).all() and (found["sum_sq_prob"] == 1).all()
    assert all((gradient == 0).all() for gradient in got)


@BOTH
def test_order_and_repetition_do_not_matter(run):
    made, ids, extra, weights = operands()
    listed, offsets = lists(ids, extra)
    each = [listed[a:b] for a, b in itertools.pairwise(offsets)]
    twice = torch.cat([torch.cat([x.flip(0), x]) for x in each]), 2 * offsets
    for a, b in zip(*(gradients(run, made, ids, extra, weights, allowed=x)[1] for x in ((listed, offsets), twice)),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [1, 7, None])
@BOTH
def test_chunks_and_dropped_rows_change_nothing(run, chunk):
    made, ids, extra, weights = operands()
    listed, offsets = lists(ids, extra)
    dead = torch.rand(ROWS) < 0.5
    weights[:, dead] = 0.0
    whole, expected = gradients(run, made, ids, extra, weights, allowed=(listed, offsets), chunk=ROWS)
    counts = offsets.diff().masked_fill(dead, 0)  # what is dropped needs no list
    fewer = listed[~dead.repeat_interleave(offsets.diff())], torch.cat([torch.zeros(1).long(), counts.cumsum(0)])
    drop = {"mask": ~dead} if run is scored else {"live": ~dead}
    for options in ({"allowed": (listed, offsets)}, {"allowed": (listed, offsets), **drop}, {"allowed": fewer, **drop}):
        found, got = gradients(run, made, ids, extra, weights, chunk=chunk, **options)
        for name in OUTPUTS:
            a, b = (x[name][~dead].nan_to_num(neginf=-99.0) for x in (found, whole))
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=2e-6 * b.abs().max())
    with pytest.raises(ValueError, match=f"at least one token in every row .* none in row {int((~dead).nonzero()[0])}"):
        counts[int((~dead).nonzero()[0])] = 0
        nobody = fewer[0][: int(counts.sum())], torch.cat([torch.zeros(1).long(), counts.cumsum(0)])
        gradients(run, made, ids, extra, weights, chunk=chunk, allowed=nobody, **drop)


@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_scopes(scope):
    made, ids, extra, weights = operands()
    allowed, offsets = lists(ids, extra), torch.tensor([0, 3, 3, 14, 33, 45])
    _, expected = gradients(learnt, made, ids, extra, weights, allowed=allowed)
    for live in (None, torch.arange(ROWS) >= 0):
        options = {"scope": scope, "offsets": offsets, "live": live, "chunk": 4, "allowed": allowed}
        _, got = gradients(learnt, made, ids, extra, weights, **options)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=2e-6 * b.abs().max())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("memory", [15, 45])
def test_kept_logits_are_the_restricted_ones(memory, head):
    made, ids, extra, weights = operands()
    allowed = lists(ids, extra)
    whole, expected = gradients(scored, made, ids, extra, weights, allowed=allowed, chunk=10, **HEADS[head])
    memory *= 4 * VOCABULARY
    found, got = gradients(scored, made, ids, extra, weights, allowed=allowed, chunk=10, memory=memory, **HEADS[head])
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=2e-6 * b.abs().max()) for a, b in zip(got, expected, strict=True))


def test_a_likely_second_token_keeps_the_digits_of_its_gradient():
    """1 - p in 16 bits, as it leaves for the products on a GPU: a difference from 1 there would have none left."""
    x, ids, extra = torch.randn(3, VOCABULARY), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 2])
    x.scatter_(1, extra[:, None], 14.0)
    head = head_of(
        "op", ids, torch.float32, bias=None, softcap=None, logit_scale=None, temperature=1.0, extra_ids=extra
    )
    rows, out = torch.arange(3), torch.full(x.shape, torch.nan, dtype=torch.bfloat16)
    statistics = head.statistics(x, ids, rows, ("extra_logprob",), "reference")
    coefficients = head.coefficients(statistics, {"extra_logprob": torch.ones(3)}, VOCABULARY)
    head.gradient(x, ids, rows, statistics[2:4], coefficients, out, "reference")
    z = x.double().requires_grad_()
    z.log_softmax(1).gather(1, extra[:, None]).sum().backward()
    assert 0 < z.grad.gather(1, extra[:, None]).max() < 1e-3
    check_rows("d_logits", out, z.grad, z.grad.float(), torch.bfloat16, ids=extra)


def test_padding_may_hold_anything():
    (hidden, weight, _), ids, extra, _ = operands()
    mask = torch.rand(ROWS) < 0.5
    offsets = torch.cat([torch.zeros(1).long(), mask.cumsum(0)])
    given = {"extra_ids": extra.masked_fill(~mask, -100), "outputs": OUTPUTS, "mask": mask}
    out = linear_logprob(hidden.requires_grad_(), weight, ids, allowed=(ids[mask], offsets), **given)
    out.logprob.sum().backward()
    assert (out.logprob == 0).all() and (out.extra_logprob[~mask] == 0).all()


def test_rows_of_rollouts():
    (hidden, weight, _), ids, extra, _ = operands()
    allowed = lists(ids, extra)
    flat = linear_logprob(hidden, weight, ids, outputs=OUTPUTS, extra_ids=extra, allowed=allowed)
    square = linear_logprob(
        hidden.view(5, 9, WIDTH), weight, ids.view(5, 9), outputs=OUTPUTS, extra_ids=extra.view(5, 9), allowed=allowed
    )
    assert all(torch.equal(getattr(square, name).flatten(), getattr(flat, name)) for name in OUTPUTS)


def test_gradcheck():
    (hidden, weight, bias), ids, extra, _ = operands(torch.float64)
    leaves = [hidden[:5].requires_grad_(), weight[:11].requires_grad_(), bias[:11].requires_grad_()]
    ids, extra = ids[:5] % 11, extra[:5] % 11
    allowed = torch.stack([ids, extra, (ids + 3) % 11], 1).flatten(), 3 * torch.arange(6)

    def outputs(hidden, weight, bias):
        given = {"bias": bias, "extra_ids": extra, "allowed": allowed, "softcap": 9.0, "chunk": 2}
        return tuple(vars(linear_logprob(hidden, weight, ids, outputs=OUTPUTS, **given)).values())

    assert torch.autograd.gradcheck(outputs, leaves)


def test_compiles_without_a_graph_break():
    (hidden, weight, bias), ids, extra, _ = operands()
    listed, offsets = lists(ids, extra, misses=False)
    down, up = torch.randn(2, WIDTH), torch.randn(VOCABULARY, 2)
    graphs = []

    def loss(hidden, bias, down, up, ids, extra, listed, offsets):
        out = linear_logprob(
            torch.tanh(hidden), weight, ids, bias=bias, outputs=("logprob", "extra_logprob"), extra_ids=extra,
            allowed=(listed, offsets), lora=(down, up, 0.5), chunk=10,
        )  # fmt: skip
        return (out.logprob * out.extra_logprob).sum()

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for rows in range(26, 45):
        leaves = [x.clone().requires_grad_() for x in (hidden[:rows], bias, down, up)]
        given = *leaves, ids[:rows], extra[:rows], listed[: offsets[rows]], offsets[: rows + 1]
        expected = torch.autograd.grad(loss(*given), leaves)
        assert all(map(torch.equal, torch.autograd.grad(compiled(*given), leaves), expected))
    assert len(graphs) <= 2


def test_taking_lists():
    whole = Allowed(torch.arange(10, 19), torch.tensor([0, 2, 2, 5, 9]))
    some = whole.take("op", torch.tensor([3, 0]))
    assert some.ids.tolist() == [15, 16, 17, 18, 10, 11] and some.offsets.tolist() == [0, 4, 6]
    assert (
        some.rows.tolist() == [0, 0, 0, 0, 1, 1]
        and whole.take("op", torch.tensor([], dtype=torch.int64)).ids.tolist() == []
    )
    with pytest.raises(ValueError, match=r"op: allowed must list .* none in row 1"):
        whole.take("op", torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"op: allowed must list .* none in row 1"):
        whole.take("op", None)


FULL = torch.arange(ROWS), torch.arange(ROWS + 1)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"allowed": FULL[0]}, r"allowed must be \(ids, offsets\)"),
        ({"allowed": (FULL[0], FULL[1][1:])}, r"allowed's offsets must be \(46,\) int64 on the host"),
        ({"allowed": (FULL[0].int(), FULL[1])}, r"allowed's ids must be \(M,\) int64"),
        ({"allowed": (FULL[0], FULL[1] + 1)}, "offsets must rise from 0 to 45"),
        ({"allowed": (FULL[0], FULL[1].flip(0))}, "offsets must rise from 0 to 45"),
        ({"allowed": (FULL[0] + 300, FULL[1])}, r"allowed's ids must lie in \[0, 301\); got 344"),
        ({"allowed": (FULL[0] - 1, FULL[1])}, r"allowed's ids must lie in \[0, 301\); got -1"),
        ({"allowed": FULL, "outputs": ("logprob", "mean_logit")}, "outputs must be finite where .* got .'mean_logit'."),
        ({"outputs": ("logprob", "extra_logprob")}, "outputs must be among .* Give extra_ids"),
        ({"extra_ids": FULL[0]}, "extra_ids must be read"),
        ({"extra_ids": FULL[0][1:], "outputs": OUTPUTS}, r"extra_ids must be \(45,\) int64"),
        ({"extra_ids": FULL[0] + 300, "outputs": OUTPUTS}, r"extra_ids: each must lie in \[0, 301\)"),
    ],
)
@BOTH
def test_bad_input_gets_one_sentence(run, change, message):
    (hidden, weight, _), ids, *_ = operands()
    with pytest.raises(ValueError, match=message):
        if run is scored:
            linear_logprob(hidden, weight, ids, **change)
        else:
            linear_policy_loss(hidden, weight, ids, lambda out, rows: -out.logprob, **change)
