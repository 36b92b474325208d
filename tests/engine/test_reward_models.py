"""Reward models: the scores of transformers' own classifier, at the last token, in any batch, and what is refused."""

import asyncio
import shutil

import pytest
import tiny_models
import tiny_runs
import torch
import transformers
from loopback import Reply, in_turn, serving
from tolerance import check

from fuserl.engine import export, loop, models, reward_models, trained
from fuserl.engine.config import Config
from fuserl.engine.endpoint import Endpoint
from fuserl.engine.reward_models import RewardModel, ServedRewardModel, batches, padded

COMPLETIONS = ["2", " 23", "2+3-4", "", "9\n0 1"]


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(models, "_tokenizer", lambda source: tiny_runs.Characters())


def written(folder, family="llama", **changes):
    """A folder with a classifier, as a reward model is exported; and its head."""
    head = torch.nn.Linear(32, 1, bias=False)
    return str(export.write(tiny_models.model(family, **changes), None, folder, score=head))


def config(folder, **changes):
    return Config(**{"device": "cpu", "reward_model": folder, "stop": (), **changes}).resolved()


def theirs(folder, texts, dtype=torch.float32):
    """What transformers' forward gives each text alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    ids = [torch.tensor([tiny_runs.Characters()(text).input_ids]) for text in texts]
    with torch.no_grad():
        return torch.cat([model(each).logits[:, 0] for each in ids])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("micro_tokens", [1, 20, 4096])
def test_scores_are_those_of_transformers(family, micro_tokens, tmp_path):
    folder = written(tmp_path / "scored", family)
    score = reward_models.configured(config(folder, stop=("\n",), micro_tokens=micro_tokens))
    texts = ["1+1= 2\n", "1+1= 23\n", "1+1= 2+3-4\n", "1+1= \n", "1+1= 9\n0 1\n"]  # a space between, the stop behind
    got = score("1+1=", COMPLETIONS)
    assert got.shape == (5,) and got.dtype == torch.float32 and not got.requires_grad
    check("scores", got, theirs(folder, texts, torch.float64), theirs(folder, texts), torch.float32)
    assert got.std() > 0.01 and not any(each.requires_grad for each in score.model.parameters())


def test_the_end_of_text_is_read_even_where_it_pads(tmp_path):
    """As the recipe trains it; transformers' own forward takes the last token that is not its padding."""
    score = reward_models.configured(config(written(tmp_path / "scored", pad_token_id=2)))
    got = score("1+1=", ["2", "2+3"])
    ids = [torch.tensor([[*tiny_runs.Characters()(text).input_ids, 2]]) for text in ("1+1= 2", "1+1= 2+3")]
    with torch.no_grad():
        hidden = [score.model.base_model(each).last_hidden_state[:, -1] for each in ids]
        expected = score.model.score(torch.cat(hidden))[:, 0]
        early = torch.cat([score.model(each).logits[:, 0] for each in ids])
    assert torch.allclose(got, expected, atol=1e-5) and not torch.allclose(early, expected, atol=1e-2)


def test_a_classifier_with_another_head_runs_its_own_forward():
    class Other(torch.nn.Module):
        config, device = transformers.PretrainedConfig(num_labels=1), "cpu"

        def forward(self, input_ids, attention_mask):
            return transformers.modeling_outputs.SequenceClassifierOutput(
                logits=(input_ids * attention_mask).sum(1, keepdim=True).float()
            )

    assert RewardModel(Other(), tiny_runs.Characters())("1", ["2", "22"]).tolist() == [27.0, 32.0]
    assert RewardModel(Other(), tiny_runs.Characters())("1", []).shape == (0,)


def test_a_server_scores_with_the_last_number_of_its_reply():
    def pooled(number, asked):
        length = len(asked.body["input"])
        return Reply({"data": [{"index": 0, "data": [[0.25], [length / 2]] if length % 2 else [length / 2]}]})

    with serving(pooled) as server:
        settings = dict(device="cpu", reward_model=server.url.removesuffix("/v1"), stop=("\n",))
        with pytest.raises(ValueError, match=r"reward_model: a server must .* Add --reward-model-name NAME"):
            reward_models.configured(Config(**settings).resolved())
        score = reward_models.configured(Config(**settings, reward_model_name="small").resolved())
        got = score("1+1=", ["2", " 34", "2"], answer="2", metadata={})
    assert torch.equal(got, torch.tensor([3.5, 4.0, 3.5])) and score("1+1=", []).shape == (0,)
    assert sorted((each.path, each.body["model"], each.body["input"]) for each in server.asked) == [
        ("/pooling", "small", "1+1= 2\n"),
        ("/pooling", "small", "1+1= 34\n"),
    ]


@pytest.mark.parametrize(
    "body", [{"data": []}, {"data": [{"data": []}]}, {"data": [{"data": [True]}]}, {"data": ["1"]}]
)
def test_a_reply_without_a_score_is_refused(body):
    with serving(in_turn(Reply(body))) as server, pytest.raises(RuntimeError, match="must answer as OpenAI's servers"):
        ServedRewardModel(Endpoint(server.url, "small"))("1", ["2"])


@pytest.mark.parametrize("workers", [0, 1])
def test_without_one_the_runs_own_reward_scores(workers, tmp_path):
    score = reward_models.configured(tiny_runs.config(tmp_path, "run", reward_workers=workers).resolved())
    got = score("1+1=", ["2", "3"], answer="2", metadata={})
    assert torch.equal(got, torch.tensor([1.0, 0.0])) and got.dtype == torch.float32

    async def inside():
        return score("1+1=", ["3", "2"], answer="2", metadata={})

    assert torch.equal(asyncio.run(inside()), torch.tensor([0.0, 1.0]))
    score = reward_models.configured(tiny_runs.config(tmp_path, "run", reward_model="tiny_runs:shortness").resolved())
    assert score("1+1=", ["2", "234"]).tolist() == [0.75, 0.25] and score("1+1=", []).shape == (0,)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
def test_a_run_scores_as_what_is_exported_of_it(changes, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    run = str(loop.train(tiny_runs.config(tmp_path, "run", recipe="reward_model", lr=0.1, eval_every=0, **changes)))
    trained.export(run, str(tmp_path / "new"), "float32")
    direct, exported = (reward_models.configured(config(folder)) for folder in (run, str(tmp_path / "new")))
    assert torch.equal(direct("1+1=", COMPLETIONS), exported("1+1=", COMPLETIONS))
    assert direct("1+1=", COMPLETIONS).abs().min() > 0
    assert not any(parameter.requires_grad for parameter in direct.model.parameters())


def test_what_is_no_reward_model_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as using:
        tiny_runs.use(using)
        run = loop.train(tiny_runs.config(tmp_path, "run", reward="tiny_runs:shortness", steps=1, eval_every=0))
        with pytest.raises(ValueError, match=r"must have trained a reward model; .*run is one of grpo\. Name a run"):
            reward_models.configured(config(str(run)))
        young = loop.train(tiny_runs.config(tmp_path, "young", recipe="reward_model", steps=1, eval_every=0))
        shutil.rmtree(young / "checkpoints")
        with pytest.raises(ValueError, match=r"must have a checkpoint; .*young has none yet"):
            reward_models.configured(config(str(young)))
    export.write(tiny_models.model(), None, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"lacks score\.weight"):
        reward_models.configured(config(str(tmp_path / "plain")))
    made = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**tiny_models.SIZES, num_labels=2))
    made.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"must have one label, a score; it has 2\. Take a reward model"):
        reward_models.configured(config(str(tmp_path / "two")))
    with pytest.raises(ValueError, match="there is no such folder"):
        reward_models.configured(config(str(tmp_path / "none")))


def test_batches_hold_every_text_once_and_no_more_tokens_than_allowed():
    assert batches([5, 1, 9, 2, 2], 6) == [[1, 3, 4], [0], [2]] and batches([], 6) == []
    assert batches([3, 3], 6) == [[0, 1]] and batches([3, 3], 5) == [[0], [1]]
    got = padded([torch.tensor([5, 6]), torch.tensor([7])], "cpu")
    assert got["input_ids"].tolist() == [[5, 6], [7, 0]] and got["attention_mask"].tolist() == [[1, 1], [1, 0]]
