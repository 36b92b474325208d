"""The endpoint's client against a server on this machine: tries, pauses, limits, the cache, and what errors say."""

import asyncio
import email.utils
import json
import socket
import threading

import pytest
from loopback import Pauses, Reply, in_turn, said, serving

from fuserl.engine import endpoint
from fuserl.engine.endpoint import Cache, Endpoint, fingerprint

ASKED = [{"role": "user", "content": "2 + 2 ="}]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No proxy, no key."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def client(server, **options):
    return Endpoint(server.url, "small", **{"sleep": Pauses(), **options})


def answer(made, messages=ASKED, **sampling):
    return asyncio.run(made.answer(messages, **sampling))


def test_an_answer_comes_back_and_the_question_is_as_openai_has_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(in_turn(said("4 é"))) as server:
        made = client(server)
        monkeypatch.setenv("OPENAI_API_KEY", "newer")  # the one of the time of the call
        assert answer(made, temperature=0.0, max_tokens=3) == "4 é"
    [asked] = server.asked
    assert asked.path == "/v1/chat/completions" and asked.headers["Authorization"] == "Bearer newer"
    assert asked.body == {"model": "small", "messages": ASKED, "temperature": 0.0, "max_tokens": 3}
    assert made.counts == {"calls": 1, "retries": 0, "cached": 0} and "newer" not in repr(vars(made))


def test_without_a_key_none_is_sent_and_half_letters_are_replaced():
    with serving(in_turn(said(None))) as server:
        assert answer(client(server), [{"role": "user", "content": "\ud800 é"}]) == ""
    assert "Authorization" not in server.asked[0].headers and server.asked[0].body["messages"][0]["content"] == "? é"


@pytest.mark.parametrize(
    ("bad", "pauses"),
    [
        ([Reply(status=500)], [1.0]),
        ([Reply(status=503), Reply(status=502), Reply(status=408)], [1.0, 2.0, 4.0]),
        ([Reply(status=429, headers={"Retry-After": "7"})], [7.0]),
        ([Reply(status=429, headers={"Retry-After": "soon"})], [1.0]),
        ([Reply(status=503, headers={"Retry-After": "-3"})], [0.0]),
        ([Reply(status=429, headers={"Retry-After": "nan"})], [0.0]),
    ],
)
def test_a_server_without_room_is_asked_again_after_a_pause(bad, pauses):
    with serving(in_turn(*bad, said("4"))) as server:
        made = client(server)
        assert answer(made) == "4"
    assert made._sleep == pauses and made.counts == {"calls": len(bad) + 1, "retries": len(bad), "cached": 0}


def test_a_pause_until_a_date_is_kept(monkeypatch):
    now = 1_700_000_000.0
    monkeypatch.setattr(endpoint.time, "time", lambda: now)
    date = email.utils.formatdate(now + 9, usegmt=True)
    with serving(in_turn(Reply(status=429, headers={"Retry-After": date}), said("4"))) as server:
        made = client(server)
        assert answer(made) == "4" and made._sleep == [9.0]


def test_a_long_pause_ends_it():
    with serving(in_turn(Reply(status=429, headers={"Retry-After": "86400"}))) as server:
        made = client(server)
        with pytest.raises(RuntimeError, match=r"429.* \(1 try\)\. It asks for a pause of 86400 s\. "):
            answer(made)
    assert made._sleep == []


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_what_is_refused_is_not_asked_again_and_the_key_stays_secret(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    refusal = Reply(b"wrong key sk-secret, \nsee " + b"x" * 900, status=status)
    says = rf"endpoint: http://127.*/v1/chat/completions must .* it said {status}"
    with serving(in_turn(refusal)) as server, pytest.raises(RuntimeError, match=says) as error:
        answer(client(server))
    assert len(server.asked) == 1 and "wrong key ***, see xxx" in str(error.value)
    assert "secret" not in str(error.value) and len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_server_that_fails_for_ever_is_named():
    with serving(in_turn(Reply(b"no memory", status=500))) as server:
        made = client(server, retries=2)
        with pytest.raises(RuntimeError, match=r"it said 500: 'no memory' \(3 tries\)\. Check the address"):
            answer(made)
    assert len(server.asked) == 3 and made._sleep == [1.0, 2.0]


def test_a_late_server_is_left():
    gate = threading.Event()

    def late(number, asked):
        if number == 0:
            gate.wait(60)
        return said("4")

    with serving(late) as server:
        made = client(server, timeout=0.2)
        with_one_more = client(server, timeout=0.2, retries=0)
        try:
            assert answer(made) == "4" and made._sleep == [1.0]
            server.asked.clear()
            with pytest.raises(RuntimeError, match=r"it took more than 0\.2 s \(1 try\)"):
                answer(with_one_more)
        finally:
            gate.set()


def test_nobody_there():
    with socket.socket() as taken:  # bound, but it does not listen
        taken.bind(("127.0.0.1", 0))
        made = Endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}", "small", retries=1, sleep=Pauses())
        with pytest.raises(RuntimeError, match=r"/v1/chat/completions must .* cannot be reached: \w*Error: .*2 tries"):
            answer(made)


def test_a_torn_answer_is_asked_for_again():
    torn = Reply(b'{"choices"', headers={"Content-Length": 900, "Connection": "close"})
    with serving(in_turn(torn, said("4"))) as server:
        made = client(server)
        assert answer(made) == "4" and made._sleep == [1.0]


@pytest.mark.parametrize(
    "body",
    [b"<html>hello", b"\xff", b"", b"[" * 100_000, [], {}, {"choices": []}, {"choices": None}, {"choices": [{}]},
     {"choices": [{"message": "4"}]}, {"choices": [{"message": {"content": 4}}]}, b"4"],
)  # fmt: skip
def test_nonsense_is_refused_in_one_sentence(body):
    says = r"must answer as OpenAI's servers do; got '.*'\. Check the address"
    with serving(in_turn(Reply(body))) as server, pytest.raises(RuntimeError, match=says):
        answer(client(server))
    assert len(server.asked) == 1


def test_no_more_calls_than_asked_for_are_under_way():
    two, lock, running, seen = threading.Barrier(2), threading.Lock(), [0], []

    def slow(number, asked):
        with lock:
            running[0] += 1
            seen.append(running[0])
        two.wait(60)  # goes on only where two are there at once
        with lock:
            running[0] -= 1
        return said(str(number))

    async def all_of_them(made):
        return await asyncio.gather(*(made.answer(ASKED, seed=seed) for seed in range(6)))

    with serving(slow) as server:
        answers = asyncio.run(all_of_them(client(server, concurrency=2)))
    assert sorted(answers) == list("012345") and max(seen) == 2


def test_the_same_question_is_asked_once_even_at_once():
    async def thrice(made):
        return await asyncio.gather(*(made.answer(ASKED, temperature=0.0) for _ in range(3)))

    with serving(lambda number, asked: said(str(number))) as server:
        made = client(server)
        assert asyncio.run(thrice(made)) == ["0", "0", "0"]
        assert asyncio.run(thrice(made)) == ["0", "0", "0"]  # on another event loop
        assert made.counts == {"calls": 1, "retries": 0, "cached": 5}
        assert answer(made, temperature=0.0, seed=1) == "1" and answer(made, ASKED * 2, temperature=0.0) == "2"
        assert answer(Endpoint(server.url, "large"), temperature=0.0) == "3"


def test_answers_on_disk_are_there_for_others_and_broken_ones_are_written_anew(tmp_path):
    with serving(lambda number, asked: said(f"{number} \ud800")) as server:
        folder = tmp_path / "a" / "b"
        first = answer(client(server, cache=folder))
        again = client(server, cache=folder)
        assert answer(again) == first == "0 \ud800" and again.counts["cached"] == 1 and len(server.asked) == 1
        [path] = [path for path in folder.rglob("*") if path.is_file()]
        good = path.read_bytes()
        broken = [b"", good[:-3], b"[]", b"\xff", b"[" * 100_000, json.dumps({"key": "another", "value": "x"}).encode()]
        broken += [json.dumps({"key": json.loads(good)["key"]}).encode()]
        for number, content in enumerate(broken, 1):
            path.write_bytes(content)
            assert answer(client(server, cache=folder)) == f"{number} \ud800"
            assert json.loads(path.read_bytes())["value"] == f"{number} \ud800"
    assert not list(folder.rglob("*.draft"))


def test_a_refusal_is_not_kept(tmp_path):
    with serving(in_turn(Reply(status=404), Reply(b"hm"), said("4"))) as server:
        made = client(server, cache=tmp_path)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                answer(made)
        assert answer(made) == "4"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"cache: cannot write .*file.* Make room, or name another folder"):
        Cache(tmp_path / "file").write(fingerprint("a"), "b")


def test_memory_keeps_the_newest(monkeypatch):
    monkeypatch.setattr(endpoint, "_KEPT", 20)
    kept = Cache()
    for number in range(9):
        kept.write(str(number), "12345678")  # ten letters with its marks
    kept.write("8", "1")
    assert [kept.read(str(number)) is not None for number in range(9)] == [False] * 7 + [True] * 2
    kept.write("9", "x" * 50)
    assert kept.read("9") == "x" * 50 and kept.read("8") is None


def test_a_fingerprint_is_that_of_the_content():
    assert fingerprint("a", {"b": 1, "c": 2}) == fingerprint("a", {"c": 2, "b": 1}) != fingerprint("a", {"b": 1})
    assert fingerprint("ab", "c") != fingerprint("a", "bc") and fingerprint(1) != fingerprint("1")


@pytest.mark.parametrize(
    ("url", "made"),
    [
        ("http://host", "http://host/v1"),
        ("https://host:8000/", "https://host:8000/v1"),
        ("http://host/api/v2/", "http://host/api/v2"),
        ("http://[::1]:80/v1/chat/completions", "http://[::1]:80/v1"),
    ],
)
def test_addresses_are_understood(url, made):
    assert Endpoint(url, "m").url == made


@pytest.mark.parametrize(
    "url",
    ["", "host:8000", "ftp://host", "http://", "http://host:x", "http://host:99999", "http://h/v1?key=1", "http://h h",
     "http://me:secret@host/v1", "http://[::1", "http://h\n"],
)  # fmt: skip
def test_addresses_that_are_none_are_refused(url):
    with pytest.raises(ValueError, match=r"endpoint: url must be http\(s\)://HOST"):
        Endpoint(url, "m")


@pytest.mark.parametrize(
    "bad", [{"timeout": 0}, {"timeout": -1.0}, {"retries": -1}, {"concurrency": 0}, {"model": ""}], ids=str
)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"endpoint: {next(iter(bad))} must be"):
        Endpoint(**{"url": "http://host", "model": "m", **bad})
