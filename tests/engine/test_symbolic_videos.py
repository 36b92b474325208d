"""The made-up videos: functions of their arguments, all tasks in turn, answers that their metrics call perfect."""

from fuserl.engine import grounding, prompts
from fuserl.engine.symbolic_videos import DATASETS, NAME, TASKS, Videos


def test_problems_are_a_function_of_the_arguments_and_take_turns():
    videos = Videos()
    first = videos.take(3, 16, 64, frozenset())
    assert first == Videos().take(3, 16, 64, frozenset()) and first != videos.take(3, 80, 64, frozenset())
    pairs = [(problem.metadata["dataset"], problem.metadata["task"]) for problem in first]
    assert all(pairs.count((dataset, task)) >= 6 for dataset in DATASETS for task in TASKS)
    assert len({problem.question for problem in first}) == 64
    apart = frozenset(problem.question for problem in first[:9])
    assert not apart & {problem.question for problem in videos.distinct(3, 64, apart)}


def test_answers_are_right_in_their_own_format():
    for problem in Videos().distinct(0, 80):
        task, answer = problem.metadata["task"], problem.answer
        if task == "TAG":
            begin, end = grounding.interval(answer)
            shown = dict(part.split(":") for part in problem.question.partition("\n")[0].split()[1:])
            action = problem.question.split()[-1].rstrip("?")
            assert {int(frame) for frame in shown if shown[frame] == action} == {*range(int(begin), int(end))}
        elif task == "STG":
            found = grounding.boxes(answer)
            tool = problem.question.rpartition("the ")[2].split()[0]
            parts = [part.split(":") for part in answer.split()]
            assert len(found) == 2 and all(f"{frame}:{tool} {box}" in problem.question for frame, box in parts)
        assert Videos().score(answer, problem.metadata) == 1 and Videos().score("?", problem.metadata) == 0


def test_a_task_holds_some_out():
    asked = prompts.task(NAME, shots=2, held_out=8)
    assert len(asked.held_out()) == 8 and asked.drawn(0, 0, 4)[0].text.count("Answer:") == 3
