"""FuserlGRPOTrainer logs what TRL's GRPOTrainer logs, runs a prompt once, and gives idle rollouts no backward."""

import contextlib
import functools
import importlib

import pytest
import torch
import trl_runs
from rivals import rival

rival("trl", "trl.trainer.utils")
rival("trl", "trl.trainer.grpo_trainer")
drop_in = importlib.import_module("fuserl.trainers.trl")
ours = importlib.import_module("fuserl.trainers.trl_grpo")
slow = pytest.mark.slow
RUNS = {
    "dapo": {"loss_type": "dapo", "num_iterations": 1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "vespo": {"loss_type": "vespo"},
    "entropy_mask": {"top_entropy_quantile": 0.3},
    "entropy_bonus": {"entropy_coef": 0.02},
    "k3": {"beta": 0.04},
    "accumulated": {"loss_type": "dapo", "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
}
QUICK = {"dapo", "k3", "checkpointed"}
EPS = 8 * 2**-23  # a Llama's norms are float32 in any dtype


@pytest.fixture(autouse=True)
def unpatched():
    yield
    drop_in.unpatch()


def made(dtype, folder, **options):
    return trl_runs.sampled("GRPO", dtype, folder, trainer=ours.FuserlGRPOTrainer, **options)


@pytest.mark.parametrize("signal", ["every", "some"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else slow) for name in RUNS])
def test_ten_steps(name, signal, tmp_path, monkeypatch):
    if signal == "some":  # half of the groups have equal rewards, in others some advantages are 0
        monkeypatch.setattr(
            trl_runs, "rewards", lambda completion_ids, **_: [float(len(x) > 3) for x in completion_ids]
        )
    plain = functools.partial(trl_runs.sampled, "GRPO", **RUNS[name])
    truth = trl_runs.history(plain, trl_runs.defined(), torch.float64, tmp_path)
    theirs = trl_runs.history(plain, [], torch.float32, tmp_path)
    got = trl_runs.history(functools.partial(made, **RUNS[name]), [], torch.float32, tmp_path)
    assert got.keys() == theirs.keys() == truth.keys() and {"loss", "grad_norm"} <= got.keys()
    for metric, true in truth.items():
        worst, allowed = (got[metric] - true).abs(), 2 * (theirs[metric] - true).abs().max() + 4 * 2**-23 * true.abs()
        assert (worst <= allowed).all(), f"{metric}: {worst} where {allowed} is allowed of {true}"


def batch(advantages):
    """Three rollouts of one prompt and one of another, padded as TRL has them."""
    draw = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(3, 60, shape, generator=draw) for shape in ((2, 6), (4, 5)))
    owner, lengths = torch.tensor([0, 0, 0, 1]), torch.tensor([5, 1, 3, 4])
    prompt_mask = torch.ones(4, 6, dtype=torch.int64)
    prompt_mask[3, :2] = 0
    mask = (torch.arange(5) < lengths[:, None]).long()
    return {
        "prompt_ids": prompts[owner] * prompt_mask, "prompt_mask": prompt_mask, "completion_ids": completions * mask,
        "completion_mask": mask, "num_items_in_batch": mask.sum(), "advantages": torch.tensor(advantages),
    }  # fmt: skip


def loss_of(trainer, inputs):
    """The loss, the gradients, and how many tokens went through the model with and without a gradient."""
    trainer.current_gradient_accumulation_steps, tokens = 1, {True: 0, False: 0}

    def count(module, given, out):
        tokens[torch.is_grad_enabled()] += out.shape[:2].numel()

    hook = trainer.model.get_input_embeddings().register_forward_hook(count)
    with contextlib.ExitStack() as stack:
        for definition in trl_runs.defined():  # TRL's own head is float32, whatever the model is
            stack.enter_context(definition)
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    hook.remove()
    gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    return loss.detach(), gradients, tokens


@pytest.mark.parametrize(
    "advantages,learning,idle",
    [
        # A prompt's tokens but its last, then a rollout's but its last, behind the prompt's last.
        ([1.0, -1.0, 0.5, 2.0], 5 + (5 + 1 + 3) + 3 + 4, 0),
        ([1.0, 0.0, 0.0, 2.0], 5 + 5 + 3 + 4, 5 + 1 + 3),
        ([0.0, 0.0, 0.0, 0.0], 5 + 5, 5 + (1 + 3) + 3 + 4),
    ],
)
def test_what_runs(advantages, learning, idle, tmp_path):
    import trl

    inputs = batch(advantages)
    packed = made(torch.float64, tmp_path, loss_type="dapo")
    drop_in.unpatch()
    loss, gradients, tokens = loss_of(packed, inputs)
    plain = trl_runs.sampled("GRPO", torch.float64, tmp_path, loss_type="dapo")
    assert type(plain) is trl.GRPOTrainer
    expected, wanted, _ = loss_of(plain, inputs)
    assert tokens == {True: learning, False: idle}
    assert abs(loss - expected) <= EPS and (gradients - wanted).norm() <= EPS * wanted.norm()
    assert packed._metrics["train"].keys() == plain._metrics["train"].keys()
    for name, values in plain._metrics["train"].items():
        assert packed._metrics["train"][name] == pytest.approx(values, rel=EPS, abs=EPS), name


def test_a_chunk_at_a_time_and_prompts_of_one_token(tmp_path):
    trainer, inputs = made(torch.float64, tmp_path), batch([1.0, -1.0, 0.5, 2.0])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    score = functools.partial(trainer._get_per_token_logps_and_entropies, trainer.model, compute_entropy=True)
    whole, chunked = score(ids, mask, 5), score(ids, mask, 5, batch_size=3)
    short = mask.clone()
    short[:, :5] = 0
    for at in range(2):
        torch.testing.assert_close(chunked[at], whole[at], rtol=EPS, atol=EPS)
        assert (whole[at][inputs["completion_mask"] == 0] == 0).all()
    assert score(ids, short, 5)[0].shape == (4, 5) and whole[2] is None


@pytest.mark.parametrize("order", ["before the trainer", "after it"])
def test_beside_a_compiled_backbone(order, tmp_path, monkeypatch):
    def compiled(model):
        model.model = torch.compile(model.model, backend="aot_eager")
        return model

    inputs, make = batch([1.0, 0.0, 0.0, 2.0]), trl_runs.model
    loss, gradients, tokens = loss_of(made(torch.float64, tmp_path), inputs)
    if order == "before the trainer":
        monkeypatch.setattr(trl_runs, "model", lambda *given, **more: compiled(make(*given, **more)))
    trainer = made(torch.float64, tmp_path)
    if order == "after it":
        compiled(trainer.model)
    got, found, counted = loss_of(trainer, inputs)
    assert isinstance(trainer.model.model, torch._dynamo.OptimizedModule) and counted == tokens
    assert abs(got - loss) <= EPS and (found - gradients).norm() <= EPS * gradients.norm()


def test_refusals(tmp_path, monkeypatch):
    monkeypatch.setattr(ours.attention, "attach", lambda _: pytest.fail("attached"))
    with pytest.raises(ValueError, match="use_transformers_continuous_batching must be False"):
        made(torch.float32, tmp_path, use_transformers_continuous_batching=True)
