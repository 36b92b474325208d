"""What stands in the place of TRL's functions: their contract, their numbers, and every place where they are bound."""

import importlib

import pytest
import torch
import trl_runs
from rivals import rival
from tolerance import check, check_rows
from zero_3 import ZeroParamStatus

utils = rival("trl", "trl.trainer.utils")
ours = importlib.import_module("fuserl.trainers.trl")
B, T, D, V = 3, 11, 24, 301
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture
def patched():
    with ours.patch():
        yield


def theirs(path):
    return ours._HOST.original(path)


def with_gradients(function, leaves, g):
    """Outputs of the function, and the gradients of the sum of the differentiable ones with g."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    found = function(*leaves)
    loss = sum((x * y.to(x.dtype)).sum() for x, y in zip(found, g, strict=False) if x.requires_grad)
    return found, torch.autograd.grad(loss, leaves)


def compare(function, other, leaves, g, ids=None):
    """Ours at most twice as far from float64 as theirs."""
    true, d_true = with_gradients(function, [leaf.double() for leaf in leaves], g)
    got, d_got = with_gradients(function, leaves, g)
    found, d_found = with_gradients(other, leaves, g)
    for at, (a, b, c) in enumerate(zip(got, true, found, strict=True)):
        assert (a.dtype, a.requires_grad) == (c.dtype, c.requires_grad)
        a, b, c = a.detach(), b.detach(), c.detach()
        torch.testing.assert_close(c.double(), b.double(), rtol=1e-4, atol=1e-4)
        check(f"output {at}", a, b, c, torch.float32)
    for a, b, c in zip(d_got, d_true, d_found, strict=True):
        check_rows("gradient", a, b, c, torch.float32, ids=ids)


HEADS = [
    {},
    {"temperature": 0.7, "bias": True},
    {"softcap": 5.0, "scale": 0.5},
    {"temperature": 1.3, "softcap": 9.0, "scale": 2.0, "bias": True},
]


@pytest.mark.parametrize("head", HEADS)
def test_head(head):
    """All five outputs, gradient through the first two only."""
    N, ids = B * T, torch.randint(V, (B * T,))
    leaves = [torch.randn(N, D), 4 * torch.randn(V, D) / D**0.5, *([torch.randn(V)] if head.get("bias") else [])]
    rest = head.get("temperature", 1.0), 128, head.get("softcap"), head.get("scale", 1.0), FIELDS
    function = theirs("trl.kernels.chunked_logprob:ChunkedLogProbFunction")

    def called(stand_in):
        return lambda hidden, weight, bias=None: stand_in.apply(hidden, weight, bias, ids, *rest)

    compare(called(ours.ChunkedLogProb), called(function), leaves, torch.randn(5, N))


def test_head_without_rows_keeps_the_graph():
    hidden, weight = torch.randn(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    found = ours.ChunkedLogProb.apply(hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 128, outputs=())
    found[0].sum().backward()
    assert found[1:] == (None,) * 4 and torch.equal(weight.grad, torch.zeros(V, D))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("caps", [(None, None), (6.0, 9.0)])
def test_divergence_of_heads(beta, caps):
    """Student and teacher of different widths, biases and multipliers."""
    N, teacher = B * T, (torch.randn(B * T, 16), torch.randn(V, 16), torch.randn(V))
    leaves = [torch.randn(N, D), torch.randn(V, D), torch.randn(V)]
    function = theirs("trl.kernels.chunked_divergence:ChunkedDivergenceFunction")

    def called(stand_in):
        def apply(hidden, weight, bias):
            given = hidden, weight, bias, *(x.to(hidden.dtype) for x in teacher)
            return stand_in.apply(*given, beta, 0.9, 0.5, caps[0], 0.7, caps[1])

        return apply

    compare(called(ours.ChunkedDivergence), called(function), leaves, torch.randn(2, N))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_from_logits(temperature, masked):
    logits, ids, g = 4 * torch.randn(B, T, V), torch.randint(V, (B, T)), torch.randn(2, B, T)
    mask = (torch.rand(B, T) < 0.6).int() if masked else None
    given = {"temperature": temperature, "row_mask": mask}
    both, one, entropy = (
        theirs(f"trl.trainer.utils:{name}")
        for name in ("selective_log_softmax_and_entropy", "selective_log_softmax", "entropy_from_logits")
    )
    compare(
        lambda x: ours.selective_log_softmax_and_entropy(x, ids, **given),
        lambda x: both(x, ids, **given), [logits], g, ids,
    )  # fmt: skip
    compare(lambda x: [ours.selective_log_softmax(x, ids, **given)], lambda x: [one(x, ids, **given)], [logits], g, ids)
    compare(lambda x: [ours.entropy_from_logits(x, chunk_size=7)], lambda x: [entropy(x)], [logits], g, ids)
    if masked:
        found = ours.selective_log_softmax_and_entropy(logits, ids.masked_fill(mask == 0, -100), **given)
        assert all(torch.equal(x[mask == 0], torch.zeros_like(x[mask == 0])) for x in found)


def test_entropy_that_wants_no_gradient():
    logits, ids = torch.randn(T, V, requires_grad=True), torch.randint(V, (T,), dtype=torch.int32)
    found = ours.selective_log_softmax_and_entropy(logits, ids, entropy_requires_grad=False)
    assert [x.requires_grad for x in found] == [True, False]


def test_several_ids_per_row_are_left_to_trl(patched):
    logits, ids = torch.randn(B, T, V), torch.randint(V, (B, T, 4))
    got = utils.selective_log_softmax(logits, ids)
    torch.testing.assert_close(got, logits.log_softmax(-1).gather(-1, ids), rtol=1e-5, atol=1e-5)


def test_log_probs_of_bfloat16_are_float32():
    logits, ids = (4 * torch.randn(B, T, V)).bfloat16(), torch.randint(V, (B, T))
    truth = ours.selective_log_softmax(logits.double(), ids)
    got = ours.selective_log_softmax(logits, ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden,weight", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_head_of_another_dtype(hidden, weight):
    """FSDP2's master weights beside bfloat16 states, and the cast of the head to float32."""
    x, w = torch.randn(9, D).to(hidden).requires_grad_(), torch.randn(V, D).to(weight).requires_grad_()
    ids = torch.randint(V, (9,))
    found = ours.ChunkedLogProb.apply(x, w, None, ids, 1.0, 128, outputs=())[0]
    found.sum().backward()
    truth = (x.double() @ w.to(hidden).double().T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    assert (x.grad.dtype, w.grad.dtype) == (hidden, weight)


def test_refusals():
    hidden, weight, ids = torch.randn(2, D), torch.randn(V, D), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"outputs must be among .*got \['entropies'\]"):
        ours.ChunkedLogProb.apply(hidden, weight, None, ids, 1.0, 128, outputs=("entropies",))
    with pytest.raises(ValueError, match="softcap must be positive"):
        ours.ChunkedLogProb.apply(hidden, weight, None, ids, 1.0, 128, 0.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        ours.selective_log_softmax(torch.randn(2, V), ids, temperature=0.0)
    weight.ds_status = ZeroParamStatus.NOT_AVAILABLE
    with pytest.raises(ValueError, match="the head must be whole"):
        ours.ChunkedLogProb.apply(hidden, weight, None, ids, 1.0, 128)


PLACES = {
    "trl.kernels.chunked_logprob:ChunkedLogProbFunction": {
        "trl.kernels.ChunkedLogProbFunction", "trl.trainer.utils._ChunkedLogProbFunction",
    },
    "trl.kernels.chunked_divergence:ChunkedDivergenceFunction": {
        "trl.trainer.distillation_trainer.ChunkedDivergenceFunction",
    },
    "trl.trainer.utils:selective_log_softmax": {"trl.trainer.utils.selective_log_softmax"},
}  # fmt: skip


def test_every_place_is_replaced_and_restored():
    importlib.import_module("trl.trainer.distillation_trainer")
    before = {path: theirs(path) for path in ours._HOST.replacements}
    with ours.patch():
        found = ours.report().replaced
        assert all(places <= set(found[path]) for path, places in PLACES.items()), found
        assert utils._use_triton(torch.device("cpu")) and not utils._use_triton(torch.device("meta"))
        assert utils._ChunkedLogProbFunction is ours.ChunkedLogProb
        kernels = importlib.import_module("trl.kernels.chunked_logprob")
        assert not kernels._use_triton(torch.device("cpu")), "TRL's own kernels ask this"
    assert {path: theirs(path) for path in before} == before and ours.report().replaced == {}


def fused(model, ids, labels):
    """Log-probs and gradients through TRL's fused head of a model."""
    utils.add_fused_lm_head(model, temperature=0.8, outputs=FIELDS)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (found.loss + found.entropy.sum()).backward()
    return found, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_rows_without_labels_are_taken_out_on_a_cpu(patched, monkeypatch):
    """The function sees the labelled rows alone, and a batch without any still differentiates."""
    seen, apply = [], ours.ChunkedLogProb.apply
    monkeypatch.setattr(
        ours.ChunkedLogProb, "apply", lambda hidden, *rest: seen.append(len(hidden)) or apply(hidden, *rest)
    )
    ids = torch.randint(3, 64, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 6, -100)
    fused(trl_runs.model(torch.float32), ids, labels)
    found, gradients = fused(trl_runs.model(torch.float32), ids, torch.full_like(ids, -100))
    assert seen == [6, 0] and found.log_probs.shape == (2, 8)
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("with_patch", [True, False])
def test_beside_a_compiled_backbone_and_peft(with_patch, request):
    """The same numbers where the backbone is compiled and its projections carry adapters."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    if with_patch:
        request.getfixturevalue("patched")
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    labels, results = ids.masked_fill(torch.arange(9) < 4, -100), []
    for compiled in (False, True):
        model = trl_runs.model(torch.float32)
        if compiled:
            model.model = torch.compile(model.model, backend="aot_eager")
        utils.add_fused_lm_head(model)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        loss = adapted(input_ids=ids, labels=labels, fused_lm_head=True).loss
        loss.backward()
        trained = [p.grad for p in adapted.parameters() if p.requires_grad]
        results.append((loss.detach(), torch.stack([g.norm() for g in trained])))
        assert model.lm_head.weight.grad is None
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
