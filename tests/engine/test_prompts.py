"""Prompts: sides of a split share no text, draws are a function of (seed, step), bad input is one sentence."""

import json
import types

import pytest

from fuserl.engine import prompts
from fuserl.engine.problems import Rows, questions

ONE_DIGIT = "reasoning_gym:chain_sum:max_terms=2,max_digits=1"  # 200 problems in all


def jsonl(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(folder, count):
    return jsonl(folder, [{"prompt": f"{n} + 1 =", "answer": n + 1, "level": n % 3} for n in range(count)])


def asked(some):
    return [prompt.metadata["question"] for prompt in some]


def config(task, **changes):
    values = {"task": task, "data": None, "few_shot": 4, "eval_problems": 50, "chat": False, "model": None}
    return types.SimpleNamespace(**{**values, "groups": 8, "seed": 0, **changes})


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
    source = Rows(numbered(tmp_path, 10))
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
        ("missing.jsonl", "readable JSONL file; got 'missing.jsonl'"),
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
        (b"\xff\xfe", "UTF-8"),
        (b"[1]", "must be a JSON object; got [1]"),
        (b'{"question": "2"}', 'text under "prompt"; got None. Its fields: question'),
        (b'{"prompt": ""}', "must have text"),
        (b'{"prompt": "a", "answer": [1]}', "must be text or a number; got [1]"),
        (b'{"prompt": "a", "answer": true}', "must be text or a number; got True"),
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


class Template:
    """A tokenizer's part in a chat: a template, and a mark that opens every text."""

    chat_template, bos_token, bos_token_id = "{{ messages }}", "<s>", 1

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return "<s>" + "".join(f"[{turn['role']}]{turn['content']}" for turn in turns) + "[assistant]"

    def __call__(self, text):
        return {"input_ids": [1]}


def test_chat_puts_examples_in_turns_and_opens_once():
    task = prompts.task(ONE_DIGIT, shots=1, held_out=1, render=prompts.chat(Template(), "Answer with a number."))
    example, asking = task.examples[0], task.held_out()[0]
    assert asking.text == (
        f"[system]Answer with a number.[user]{example.question}[assistant]{example.answer}"
        f"[user]{asking.metadata['question']}[assistant]"
    )


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="must have a chat template"):
        prompts.chat(types.SimpleNamespace(chat_template=None))
