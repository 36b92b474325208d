"""Prompts: sides of a split share no text, draws are a function of (seed, step), bad input is one sentence."""

import json
import types

import pytest
from tiny_models import Letters
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fuserl.engine import models, prompts
from fuserl.engine.files import read
from fuserl.engine.problems import Generated, questions

ONE_DIGIT = "reasoning_gym:chain_sum:max_terms=2,max_digits=1"  # 200 problems in all


def jsonl(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(folder, count, name="rows.jsonl"):
    return jsonl(folder, [{"prompt": f"{n} + 1 =", "answer": n + 1, "level": n % 3} for n in range(count)], name)


def asked(some):
    return [prompt.metadata["question"] for prompt in some]


def config(task, **changes):
    values = {"task": task, "data": None, "few_shot": 4, "eval_problems": 50, "chat": False, "model": None}
    values |= {"eval_data": None, "columns": (), "system": None, "groups": 8, "seed": 0}
    return types.SimpleNamespace(**{**values, **changes})


def test_one_digit_sums_are_drawn_apart_from_what_is_held_out():
    task = prompts.task(ONE_DIGIT, shots=4, held_out=100)
    held, shown = set(asked(task.held_out())), questions(task.examples)
    drawn = {text for step in range(60) for text in asked(task.drawn(0, step * 8, 8))}
    assert len(held) == 100 and len(shown) == 4
    assert not drawn & held and not drawn & shown and not held & shown
    assert len(drawn) > 80  # nearly all of the 96 problems left


def test_the_split_does_not_depend_on_how_much_is_held_out_of_it():
    small, large = (prompts.task(ONE_DIGIT, held_out=count) for count in (20, 60))
    assert small.examples == large.examples and asked(small.held_out()) == asked(large.held_out(20))


def test_completion_prompt_is_solved_lines_and_an_open_one():
    task = prompts.task(ONE_DIGIT, held_out=10)
    *solved, opening = task.held_out(1)[0].text.split("\n")
    assert len(solved) == 4 and all(eval(line.replace("=", "==")) for line in solved)
    assert opening.endswith(" =") and str(eval(opening[:-2])) == task.held_out(1)[0].answer


def test_longer_questions_are_set_apart():
    text = prompts.task("reasoning_gym:spell_backward", shots=2, held_out=1).held_out()[0].text
    assert text.count("\n\n") == 2 and text.count("Question: ") == 3 and text.endswith("\nAnswer:")


@pytest.mark.parametrize("name", ["reasoning_gym:chain_sum:max_terms=3", "rows"])
def test_prompts_are_a_function_of_seed_and_step(name, tmp_path):
    name = numbered(tmp_path, 90) if name == "rows" else name
    first, again = prompts.sampler(config(name)), prompts.sampler(config(name))
    later = [asked(first(step)) for step in range(1, 7)][4:]
    assert later == [asked(again(5)), asked(again(6))]
    assert asked(first(1)) != asked(first(2)) != asked(prompts.sampler(config(name, seed=1))(2))
    assert len(set(asked(first(3)))) == 8


def test_steps_walk_through_the_rows_without_overlap(tmp_path):
    sample = prompts.sampler(config(numbered(tmp_path, 94)))  # 40 rows are left to train on
    assert len({text for step in range(1, 6) for text in asked(sample(step))}) == 40


def test_neighbouring_steps_and_seeds_of_a_generator_do_not_repeat_each_other():
    task = prompts.task("reasoning_gym:chain_sum:max_terms=6,max_digits=4", held_out=1)
    draws = [text for seed in range(4) for start in range(8) for text in asked(task.drawn(seed, start, 20))]
    assert len(set(draws)) > 0.99 * len(draws)


def test_fewer_problems_than_groups_are_repeated():
    task = prompts.task(ONE_DIGIT, shots=0, held_out=197)
    drawn = asked(task.drawn(0, 0, 8))
    assert len(drawn) == 8 and len(set(drawn)) == 3


def test_rows_are_visited_once_an_epoch_in_changing_orders(tmp_path):
    source = read(numbered(tmp_path, 10))
    walk = [problem.question for start in range(0, 40, 4) for problem in source.take(0, start, 4, frozenset())]
    epochs = [walk[start : start + 10] for start in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs) and epochs[0] != epochs[1]


def test_rows_with_one_text_stay_on_one_side(tmp_path):
    path = jsonl(tmp_path, [{"prompt": f"q{n % 10}", "answer": str(n)} for n in range(40)])
    task = prompts.task(path, shots=0, held_out=4)
    assert not set(asked(task.held_out())) & set(asked(task.drawn(0, 0, 200)))


def test_a_row_is_used_as_it_is_and_keeps_its_fields(tmp_path):
    path = jsonl(tmp_path, [{"prompt": "Say 1:\n", "answer": 1, "level": "easy"}, {"prompt": "Say 2:\n"}])
    by_text = {prompt.text: prompt for prompt in prompts.task(path, shots=0, held_out=1).drawn(0, 0, 1)}
    by_text |= {prompt.text: prompt for prompt in prompts.task(path, shots=0, held_out=1).held_out()}
    assert by_text["Say 1:\n"].answer == "1" and by_text["Say 1:\n"].metadata["level"] == "easy"
    assert by_text["Say 2:\n"].answer is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reasoning_gym:chain_summ", "Did you mean 'chain_sum'?"),
        ("reasoning_gym:chain_sum:max_term=2", "Did you mean 'max_terms'?"),
        ("reasoning_gym:chain_sum:seed=2", "known name; got 'seed=2'"),
        ("reasoning_gym:chain_sum:max_terms", "must read name=value"),
        ("reasoning_gym:chain_sum:max_terms=1", "max_terms must be >= min_terms"),
        ("reasoning_gym:chain_sum:max_terms=many", "must accept its options; got max_terms=many"),
        ("chain_sum", "Did you mean 'reasoning_gym:chain_sum'?"),
        ("missing.jsonl", "readable file; got 'missing.jsonl'"),
        (ONE_DIGIT, "it has 200"),
        ("reasoning_gym:boxnet", "examples must have answers"),
    ],
)
def test_bad_names_are_one_sentence(name, says):
    with pytest.raises(ValueError) as caught:
        prompts.task(name, shots=4, held_out=200)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{oops", "must be one JSON object"),
        (b'{"prompt": "a", "level": NaN}', "JSON has no NaN"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"prompt": "a", "answer": 1e999}', "must be finite"),
        (b'{"prompt": "half \\ud83d"}', "without half characters"),
        (b'{"prompt": " \\n"}', "must have text"),
        (b"\xff\xfe", "UTF-8"),
        (b"[1]", "must be a JSON object; got [1]"),
        (b'{"question": "2"}', 'under "prompt"; got None. Its columns are question'),
        (b'{"prompt": ""}', "must have text"),
        (b'{"prompt": "a", "answer": [1]}', 'must be text or a number under "answer"; got [1]'),
        (b'{"prompt": "a", "answer": true}', 'must be text or a number under "answer"; got True'),
    ],
)
def test_bad_rows_name_file_and_line(line, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError) as caught:
        prompts.task(str(path), shots=0, held_out=0)
    assert str(caught.value).startswith(f"{path}:3: ") and says in str(caught.value)


def test_an_empty_file_and_a_file_all_held_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        prompts.task(jsonl(tmp_path, [], "none.jsonl"), shots=0, held_out=0)
    with pytest.raises(ValueError, match="must have more problems than 0 examples and 5 held out; it has 5"):
        prompts.task(numbered(tmp_path, 5), shots=0, held_out=5)


@pytest.mark.parametrize("dataset", ["chain_sum:max_terms=2,max_digits=1", "spell_backward", "graph_color"])
def test_a_generated_pair_is_the_answer_and_that_of_a_neighbour(dataset):
    few, many = (Generated(dataset).distinct(7, count) for count in (5, 40))
    assert few == many[:5]
    for problem in many:
        assert problem.chosen == problem.answer
        if problem.answer is None:
            assert problem.rejected is None
        else:
            assert problem.rejected.strip() != problem.answer.strip()
            assert Generated(dataset).score(problem.rejected, problem.metadata) < 1.0
    if dataset != "graph_color":
        prompt = prompts.task(f"reasoning_gym:{dataset}", held_out=1).drawn(0, 0, 1)[0]
        assert prompt.chosen == prompt.answer != prompt.rejected


def test_what_a_recipe_needs_is_looked_for_in_every_row(tmp_path):
    rows = [{"prompt": f"q{n}", "answer": "1", "chosen": "1", "rejected": "2"} for n in range(6)]
    prompts.task(jsonl(tmp_path, rows), shots=0, held_out=2).require("answer", "chosen", "rejected")
    for lacking in ("answer", "rejected"):
        task = prompts.task(jsonl(tmp_path, [*rows[:4], {**rows[4], lacking: None}, rows[5]]), shots=0, held_out=2)
        task.require(*{"answer", "chosen", "rejected"} - {lacking})
        with pytest.raises(ValueError, match=rf'rows.jsonl:5: every problem must have "{lacking}".*{lacking}=COLUMN'):
            task.require("chosen", lacking)
    judged = jsonl(tmp_path, [{"prompt": "q9", "answer": "1"}], "judged.jsonl")
    with pytest.raises(ValueError, match=r'judged.jsonl:1: every problem must have "chosen"'):
        prompts.task(jsonl(tmp_path, rows), shots=0, held_out=None, held_from=judged).require("chosen")
    task = prompts.task(jsonl(tmp_path, [{**rows[0], "rejected": " 1"}, *rows[1:]]), shots=0, held_out=2)
    with pytest.raises(ValueError, match=r'rows.jsonl:1: "rejected" must be a wrong completion; got \' 1\''):
        task.require("chosen", "rejected")


def test_what_a_generator_cannot_give_is_said_before_training():
    prompts.task(ONE_DIGIT, held_out=1).require("answer", "chosen", "rejected")
    with pytest.raises(ValueError, match=r'reasoning_gym:graph_color: every problem must have "chosen".*another task'):
        prompts.task("reasoning_gym:graph_color", shots=0, held_out=1).require("chosen", "rejected")
    with pytest.raises(ValueError, match='reasoning_gym:puzzle24: "rejected" must be a wrong completion'):
        prompts.task("reasoning_gym:puzzle24", shots=0, held_out=1).require("chosen", "rejected")


def test_a_held_out_file_is_all_of_it_and_never_trained_on(tmp_path):
    data = numbered(tmp_path, 30)
    judged = jsonl(tmp_path, [{"prompt": f"{n} + 1 =", "answer": n + 1} for n in range(25, 40)], "judged.jsonl")
    task = prompts.configured(config(data, eval_data=judged, eval_problems=None, few_shot=2))
    held = set(asked(task.held_out()))
    assert held == {f"{n} + 1 =" for n in range(25, 40)}
    left = {f"{n} + 1 =" for n in range(25)} - questions(task.examples)
    assert set(asked(task.drawn(0, 0, 23))) == left and len(left) == 23
    few = prompts.configured(config(data, eval_data=judged, eval_problems=4, few_shot=0))
    assert len(few.held_out()) == 4 and set(asked(few.held_out())) < held
    assert set(asked(few.drawn(0, 0, 75))) == {f"{n} + 1 =" for n in range(25)}
    with pytest.raises(ValueError, match=r"beside the questions of .*judged.jsonl; it has 15"):
        prompts.task(judged, held_from=judged, shots=0)
    with pytest.raises(ValueError, match=r"judged.jsonl must have the column that prompt is to be"):
        other = jsonl(tmp_path, [{"text": "a"}], "other.jsonl")
        prompts.task(other, held_from=judged, shots=0, columns=["prompt=text"])


def test_a_generator_may_be_judged_on_a_file(tmp_path):
    judged = jsonl(tmp_path, [{"prompt": "2 + 2 =", "answer": "4"}, {"prompt": "2 + 3 ="}], "judged.jsonl")
    task = prompts.task(ONE_DIGIT, held_from=judged, held_out=None)
    held = {prompt.metadata["question"]: prompt for prompt in task.held_out()}
    assert task.source.score("4", held["2 + 2 ="].metadata) == 1.0 > task.source.score("5", held["2 + 2 ="].metadata)
    assert task.source.unverifiable.endswith("judged.jsonl:2 has no answer")
    assert prompts.task(ONE_DIGIT, held_out=1).source.unverifiable is None


def test_unless_told_a_fifth_of_a_small_file_is_held_out(tmp_path):
    held = [
        len(prompts.task(numbered(tmp_path, count), shots=0, held_out=None).held_out()) for count in (10, 100, 2000)
    ]
    assert held == [2, 20, 200]
    assert len(prompts.task("reasoning_gym:chain_sum", held_out=None).held_out()) == 200


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    first = prompts.configured(config(numbered(tmp_path, 60)))
    again = prompts.configured(config(numbered(tmp_path, 70)))
    assert again is prompts.configured(config(again.name, groups=3, seed=9))
    assert (first.source.size, again.source.size) == (60, 70)


def test_columns_need_a_file():
    with pytest.raises(ValueError, match=r"columns: they must go with a file \(--data\); got prompt=question"):
        prompts.configured(config(ONE_DIGIT, columns=("prompt=question",)))


def test_lengths_are_measured_before_training(tmp_path):
    rows = [{"prompt": "1" * (n + 1), "answer": "2" * n, "chosen": "3", "rejected": "4" * (15 - n)} for n in range(12)]
    task = prompts.task(jsonl(tmp_path, rows), shots=0, held_out=0)
    prompts.check_lengths(task, Letters(), positions=16, new_tokens=4)
    with pytest.raises(ValueError) as caught:
        prompts.check_lengths(task, Letters(), positions=15, new_tokens=4)
    says = str(caught.value)
    assert "rows.jsonl:12: prompt and completion must fit the 15 tokens" in says and "\n" not in says
    assert "a prompt of 12 tokens and a completion of up to 4." in says
    prompts.check_lengths(task, Letters(), positions=24, new_tokens=4, completed=("answer", "chosen"))
    with pytest.raises(ValueError, match=r"rows.jsonl:12: .* prompt of 12 tokens and a completion of up to 12\."):
        prompts.check_lengths(task, Letters(), positions=23, new_tokens=4, completed=("answer", "chosen"))
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens and a completion of up to \d+\."):
        prompts.check_lengths(task, Letters(), positions=16, new_tokens=4, completed=("chosen", "rejected"))
    judged = jsonl(tmp_path, [{"prompt": "5" * 13}], "judged.jsonl")
    with pytest.raises(ValueError, match=r"judged.jsonl:1: .* a prompt of 13 tokens"):
        held = prompts.task(jsonl(tmp_path, rows), shots=0, held_from=judged)
        prompts.check_lengths(held, Letters(), positions=16, new_tokens=4)
    sums = prompts.task(ONE_DIGIT, shots=0, held_out=3)  # "1 + 1 =" is seven letters
    prompts.check_lengths(sums, lambda text: Letters()("0" * len(text)), positions=11, new_tokens=4)
    with pytest.raises(ValueError, match=r"reasoning_gym:chain_sum: .* a prompt of 7 tokens"):
        prompts.check_lengths(sums, lambda text: Letters()("0" * len(text)), positions=10, new_tokens=4)


TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn.role == 'system' and not loop.first %}{{ raise_exception('System\nlate.') }}{% endif %}"
    "[{{ turn.role }}]{{ turn.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer(template=TEMPLATE, *, opens=True):
    """A transformers tokenizer of words with a chat template; `opens`: it puts its mark in front of every text."""
    words = Tokenizer(WordLevel({"<s>": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    if opens:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="?")
    made.chat_template = template
    return made


def test_chat_puts_examples_in_turns_and_opens_once():
    for opens in (True, False):
        render = prompts.chat(tokenizer(opens=opens), "Answer with a number.")
        task = prompts.task(ONE_DIGIT, shots=1, held_out=1, render=render)
        example, asking = task.examples[0], task.held_out()[0]
        assert asking.text == ("" if opens else "<s>") + (
            f"[system]Answer with a number.[user]{example.question}[assistant]{example.answer}"
            f"[user]{asking.metadata['question']}[assistant]"
        )


SYSTEM, USER, REPLY = ({"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant"))


def only(path, render):
    return prompts.task(path, shots=0, held_out=0, render=render).drawn(0, 0, 1)[0].text


def test_messages_go_through_the_template_and_texts_as_they_are(tmp_path):
    talk, text = jsonl(tmp_path, [{"prompt": [SYSTEM, USER, REPLY, USER]}]), numbered(tmp_path, 1, "texts.jsonl")
    said = "[system]system says[user]user says[assistant]assistant says[user]user says[assistant]"
    for render in (prompts.chat(tokenizer(), "Mine.", texts=texts) for texts in (True, False)):
        assert only(talk, render) == said
    assert only(text, prompts.chat(tokenizer(), texts=False)) == "0 + 1 ="
    assert only(text, prompts.chat(tokenizer(), "Mine.")) == "[system]Mine.[user]0 + 1 =[assistant]"
    assert only(jsonl(tmp_path, [{"prompt": [USER]}]), prompts.chat(tokenizer(), "Mine.")).startswith("[system]Mine.[")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: messages must go through a chat template"):
        only(talk, prompts.completion)


def test_examples_of_conversations_leave_their_system_turns(tmp_path):
    rows = [{"prompt": [SYSTEM, {**USER, "content": str(n)}], "answer": n} for n in range(3)]
    task = prompts.task(jsonl(tmp_path, rows), shots=1, held_out=1, render=prompts.chat(tokenizer()))
    shown, held = (some[0].turns[-1]["content"] for some in (task.examples, task.held))
    assert task.held_out()[0].text == f"[system]system says[user]{shown}[assistant]{shown}[user]{held}[assistant]"


def test_what_a_template_refuses_is_named(tmp_path):
    path = jsonl(tmp_path, [{"prompt": [USER]}, {"prompt": [USER, SYSTEM, USER]}])
    task = prompts.task(path, shots=0, held_out=1, render=prompts.chat(tokenizer()))
    with pytest.raises(ValueError) as caught:
        prompts.check_lengths(task, tokenizer(), 100, 1)
    assert str(caught.value) == (
        f"{path}:2: the messages must be such that the model's chat template takes them; got the roles user, system, "
        "user, and it says: System late. Change the row, or take another model."
    )


def test_the_configured_task_takes_the_models_own_template(tmp_path):
    tokenizer().save_pretrained(tmp_path / "model")
    tokenizer(None).save_pretrained(tmp_path / "plain")
    model, plain = str(tmp_path / "model"), str(tmp_path / "plain")
    talk, text = jsonl(tmp_path, [{"prompt": [USER]}]), numbered(tmp_path, 1, "texts.jsonl")
    few = {"few_shot": 0, "eval_problems": 0}

    def first(name, **changes):
        return prompts.sampler(config(name, **few, groups=1, **changes))(1)[0].text

    assert first(talk, model=model) == "[user]user says[assistant]"
    assert first(text, model=model) == first(text, model=plain) == "0 + 1 ="
    assert first(text, model=model, chat=True, system="Add.") == "[system]Add.[user]0 + 1 =[assistant]"
    assert first(text, model=model, eval_data=talk) == "0 + 1 ="
    held = prompts.held_out(config(text, model=model, eval_data=talk, few_shot=0, eval_problems=None))
    assert held[0].text == "[user]user says[assistant]"
    with pytest.raises(ValueError, match="must have a chat template; it has none"):
        first(talk, model=plain)
    with pytest.raises(ValueError, match=r"system: it must go with chat prompts; got 'Add\.'"):
        first(text, model=model, system="Add.")


def test_a_tokenizer_is_read_without_its_model(tmp_path):
    tokenizer().save_pretrained(tmp_path / "model")
    assert models.tokenizer(str(tmp_path / "model"))("a b").input_ids == [0, 1, 1]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    for name in ("empty", "broken", "nowhere"):
        with pytest.raises(ValueError) as caught:
            models.tokenizer(str(tmp_path / name))
        assert "name must be a model folder or a hub name" in str(caught.value)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="must have a chat template"):
        prompts.chat(types.SimpleNamespace(chat_template=None))
