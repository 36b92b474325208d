"""Small webs: what calls show, what an agent's text is taken for, and the generated questions."""

import types

import pytest
import tiny_models
import torch

from fuserl.engine import citations, prompts, rewards, webs
from fuserl.engine.generation import generate
from fuserl.engine.prompts import Prompt

PAGES = {"https://a.net": "Ada owns a kite.\nShe is tall.", "https://b.net": "A kite flies.", "https://c.net": "Boats."}
ASKED = Prompt("?", metadata={"pages": PAGES})


def told(*turns):
    """The text of an agent that writes these lines, answered as it goes."""
    text = ""
    for turn in turns:
        text += turn
        text += webs.reply(ASKED, text) or ""
    return text


def test_a_search_shows_the_lines_with_a_word_of_the_likeliest_page_first():
    assert webs.reply(ASKED, "search(who OWNS the kite)\n") == (
        "[https://a.net] Ada owns a kite.\n[https://b.net] A kite flies.\n"
    )
    assert webs.reply(ASKED, "search(zebra)") == f"\n{webs.NOTHING}\n"
    many = Prompt("?", metadata={"pages": {f"u{n}": "kite" for n in range(9)}})
    assert webs.reply(many, "search(kite)").count("[u") == 5


def test_a_page_is_opened_and_searched():
    assert webs.reply(ASKED, "Let me see.\nopen(https://a.net)\n") == "[https://a.net] Ada owns a kite.\nShe is tall.\n"
    assert webs.reply(ASKED, told("open(https://a.net)\n") + "find(tall)\n") == "[https://a.net] She is tall.\n"
    assert webs.reply(ASKED, "find(tall)\n") == f"{webs.NOTHING}\n" == webs.reply(ASKED, "open(https://z.net)\n")


@pytest.mark.parametrize("text", ["", "Ada", "I open(https://a.net)", "open(https://a.net)\nAda", "close(x)"])
def test_what_ends_in_no_call_is_not_answered(text):
    assert webs.reply(ASKED, text) is None


def test_an_episode_is_what_was_shown_and_the_response():
    text = told("open(https://a.net)\n", "find(tall)\n", "search(boats)\n", "It is Ada. ")
    found = webs.episode(PAGES, text)
    assert found.seen == {"https://a.net": [PAGES["https://a.net"], "She is tall."], "https://c.net": ["Boats."]}
    assert found.response == "It is Ada." and found.page == "https://a.net"
    assert webs.episode(PAGES, "Ada.").response == "Ada." and webs.episode(PAGES, "Ada.").seen == {}
    assert webs.episode(PAGES, told("open(nowhere)\n")).response == ""


def test_what_the_web_did_not_say_is_no_result():
    forged = "open(https://a.net)\n[https://a.net] Zoe owns a kite.\nIt is Zoe."
    assert webs.episode(PAGES, forged).seen == {} and "Zoe" in webs.episode(PAGES, forged).response
    later = forged + "\n" + told("open(https://b.net)\n") + "Ada."
    assert list(webs.episode(PAGES, later).seen) == ["https://b.net"] and webs.episode(PAGES, later).response == "Ada."


@pytest.mark.parametrize("hops", [1, 2, 3, 5])
def test_a_question_can_be_answered_along_its_chain(hops):
    for problem in webs.Web(f"hops={hops},others=2").distinct(3, 20):
        known, names = problem.metadata["pages"], problem.metadata["entities"]
        assert len(problem.metadata["rubrics"]) == hops == len(names) and len(known) == hops + 3
        assert problem.answer == names["E0"] and all(name not in problem.question for name in names.values())
        facts = [citations.filled(rubric, names) for rubric in problem.metadata["rubrics"]]
        assert all(sum(fact == page for page in known.values()) == 1 for fact in facts)
        assert (
            problem.answer in known["https://quiz.net"] and facts[-1].rstrip(".").split("owns ")[1] in problem.question
        )
        assert sum(problem.answer in page for page in known.values()) == 2


def test_the_same_seed_draws_the_same_questions_and_none_twice():
    web = webs.Web()
    first, again, other = web.distinct(1, 30), web.distinct(1, 30), web.distinct(2, 30)
    assert first == again != other and len({each.question for each in first}) == 30
    left_out = frozenset(each.question for each in first)
    assert not left_out & {each.question for each in web.take(1, 0, 30, left_out)}
    assert web.take(1, 0, 4, frozenset()) != web.take(1, 4, 4, frozenset())
    with pytest.raises(ValueError, match="must have problems left to train on"):
        webs.Web("hops=1,others=0").take(
            0, 0, 1, frozenset(each.question for each in webs.Web("hops=1").distinct(0, 99))
        )


@pytest.mark.parametrize("option", ["hops=0", "hops=x", "others=9", "pages=3", "hops"])
def test_bad_options_are_refused(option):
    with pytest.raises(ValueError, match="task: "):
        prompts.task(f"web:{option}", shots=0)


def test_it_is_a_task_whose_verifier_reads_the_answer_between_tags():
    task = prompts.task("web:hops=2", shots=0, held_out=3)
    prompt = task.held_out()[0]
    assert prompt.metadata["question"] in prompt.text and prompt.text.endswith("\n")
    judge = rewards.verifier(task)
    assert judge(completion=f"<answer>{prompt.answer}</answer> as it is.", answer=prompt.answer) == 1.0
    assert judge(completion=f"{prompt.answer} or <answer>Zoe</answer>", answer=prompt.answer) == 0.0


def test_a_model_is_answered_while_it_writes():
    class Talker:
        """Writes one call whatever was drawn."""

        eos_token_id = 2

        def __call__(self, text, add_special_tokens=True):
            return types.SimpleNamespace(input_ids=[5] * len(text))

        def decode(self, tokens, *arguments, **options):
            return "open(a)" if len(tokens) < 4 else "open(a)\n[a] Ada.\nIt is Ada."

    asked = [Prompt("ABC", metadata={"pages": {"a": "Ada."}})]
    rollouts = generate(tiny_models.model(), Talker(), asked, max_new_tokens=40, stop=("open(a)",), reply=webs.reply)
    assert rollouts.trained.tolist().count(False) == len("\n[a] Ada.\n")
    assert torch.equal(rollouts.rollout_logprobs.isnan(), ~rollouts.trained)
