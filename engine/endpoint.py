"""A client for servers that speak OpenAI's protocol (vLLM, SGLang, llama.cpp, a provider): answers and embeddings.

    endpoint = Endpoint("http://localhost:8000/v1", "Qwen/Qwen3-8B", cache="answers")
    text = await endpoint.answer([{"role": "user", "content": "2 + 2 ="}], temperature=0.0)

Every call ends: a try takes `timeout` seconds at most, there are 1 + `retries` of them, and no pause between two is
longer than a minute. What was answered once is not asked again.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import hashlib
import importlib.util
import json
import os
import time
import urllib.parse
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from fuserl.engine import atomic, lookup

_LONGEST = 60.0  # seconds of a pause that are waited for
_KEPT = 2**28  # letters of answers that are held in memory
_SHOWN = 200  # letters of a server's own words


class Cache:
    """Values by the content of what was asked, in memory and, with a folder, on disk, for other processes and runs.

    A file that cannot be read, or holds something else, counts as absent and is written anew.

    Args:
        folder: made where it is missing; None keeps values in memory alone.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        self._values: dict[str, str] = {}
        self._letters = 0

    def read(self, key: str) -> object | None:
        """The value of `key`, a new copy of it; None where there is none."""
        if key not in self._values and self.folder is not None:
            try:
                found = json.loads(self._path(key).read_bytes())
            except (OSError, ValueError, RecursionError):
                return None
            if not isinstance(found, dict) or found.get("key") != key or found.get("value") is None:
                return None
            self._hold(key, json.dumps(found["value"]))
        return json.loads(self._values[key]) if key in self._values else None

    def write(self, key: str, value: object) -> None:
        """Keep a value that JSON can write.

        Raises:
            RuntimeError: the folder cannot be written.
        """
        self._hold(key, json.dumps(value))
        if self.folder is None:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, json.dumps({"key": key, "value": value}))
        except OSError as error:
            raise RuntimeError(f"cache: cannot write {path} ({error}). Make room, or name another folder.") from error

    def _hold(self, key: str, text: str) -> None:
        self._letters += len(text) - len(self._values.pop(key, ""))
        self._values[key] = text
        while self._letters > _KEPT and len(self._values) > 1:
            self._letters -= len(self._values.pop(next(iter(self._values))))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.json"


def fingerprint(*parts: object) -> str:
    """The SHA-256 of parts that JSON can write, in hexadecimal; the order of a dict does not count."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Endpoint:
    """A server and one model of it. The API key is $OPENAI_API_KEY as it is when a call is made; it is not kept.

    Args:
        url: up to the version, like https://api.openai.com/v1; without a path it is /v1.
        model: its name there.
        timeout: seconds that one try may take.
        retries: further tries where the server cannot be reached, is late, has no room (429) or fails (5xx), after the
            pause that it asks for (Retry-After) or 1, 2, 4, ... seconds. What it refuses otherwise is final.
        concurrency: calls under way at once; further ones wait.
        cache: a folder for answers; None keeps them in memory.
        sleep: waits for a number of seconds.

    Raises:
        ValueError: a url that is none, an argument out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 16,
        cache: str | Path | None = None,
        sleep: Callable = asyncio.sleep,
    ):
        self.url, self.model = _checked(url), model
        for name, value, good, contract in (
            ("model", model, bool(model), "be a name that the server knows"),
            ("timeout", timeout, timeout > 0, "be a number of seconds > 0"),
            ("retries", retries, retries >= 0, "be an integer >= 0"),
            ("concurrency", concurrency, concurrency >= 1, "be an integer >= 1"),
        ):
            if not good:
                raise ValueError(f"endpoint: {name} must {contract}; got {value!r}. Change it.")
        self.timeout, self.retries, self.concurrency, self.cache = timeout, retries, concurrency, Cache(cache)
        self.counts = {"calls": 0, "retries": 0, "cached": 0}
        self._sleep = sleep
        self._rooms: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # a semaphore belongs to one event loop
        self._asked: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    async def answer(self, messages: Sequence[dict], **sampling) -> str:
        """What the model answers to a conversation.

        The same question has the same answer, from the cache, whatever the temperature; a `seed` makes it another one.

        Args:
            messages: turns, each with a "role" and its "content".
            sampling: temperature, max_tokens, ..., as the protocol names them.

        Returns:
            Its text, empty where the model said nothing.

        Raises:
            RuntimeError: the server cannot be reached, refuses, or answers something else than a completion.
        """
        body = {"model": self.model, "messages": list(messages), **sampling}
        return await self.ask("chat/completions", body, _content)

    async def ask(self, path: str, body: dict, read: Callable) -> object:
        """What `read` takes out of the server's reply to `body`, or the cache's copy of it; raises as `answer`.

        Args:
            path: below the url, or with a / in front below the server's root.
            body: what JSON can write.
            read: (reply) -> value; a TypeError, LookupError or ValueError of its own says that the reply is no good.
        """
        url = urllib.parse.urljoin(f"{self.url}/", path)
        key = fingerprint(url, body)
        loop = asyncio.get_running_loop()
        room = self._rooms.setdefault(loop, asyncio.Semaphore(self.concurrency))
        once = self._asked.setdefault((loop, key), asyncio.Lock())  # who asks the same meanwhile waits for the answer
        async with once, room:
            value = self.cache.read(key)
            if value is not None:
                self.counts["cached"] += 1
                return value
            value = self._value(url, await self._replied(url, body), read)
            self.cache.write(key, value)
            return value

    async def _replied(self, url: str, body: dict):
        """The server's reply with status 200, after as many tries as it takes."""
        for number in range(self.retries + 1):
            reply, reason = await self._tried(url, body)
            pause = _pause(reply, number)
            if reply is not None and reply.status_code == 200:
                return reply
            again = reply is None or reply.status_code in (408, 429) or reply.status_code >= 500
            if not again or number == self.retries or pause > _LONGEST:
                break
            self.counts["retries"] += 1
            await self._sleep(pause)
        tries = "1 try" if number == 0 else f"{number + 1} tries"
        late = f" It asks for a pause of {pause:.0f} s." if again and pause > _LONGEST else ""
        raise RuntimeError(
            f"endpoint: {url} must answer for the model {self.model!r}; {reason} ({tries}).{late} "
            "Check the address, the model's name and the server."
        )

    async def _tried(self, url: str, body: dict) -> tuple[object | None, str]:
        """One try: the reply, if there is one, and what it means in words."""
        httpx, key = _httpx(), os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = json.dumps(body, ensure_ascii=False).encode(errors="replace")
        self.counts["calls"] += 1
        try:
            # A client of its own belongs to no event loop, and leaves nothing open.
            async with asyncio.timeout(self.timeout), httpx.AsyncClient(verify=_certificates(), timeout=None) as client:
                reply = await client.post(url, content=data, headers=headers)
        except TimeoutError:
            return None, f"it took more than {self.timeout:g} s"
        except httpx.HTTPError as error:
            return None, f"it cannot be reached: {type(error).__name__}: {_shown(str(error), key)}"
        return reply, f"it said {reply.status_code}: {_shown(reply.text, key)}"

    def _value(self, url: str, reply, read: Callable) -> object:
        try:
            return read(reply.json())
        except (TypeError, LookupError, ValueError, RecursionError) as error:
            said = _shown(reply.text, os.environ.get("OPENAI_API_KEY"))
            raise RuntimeError(
                f"endpoint: {url} must answer as OpenAI's servers do; got {said}. Check the address: most end in /v1."
            ) from error


def _content(reply: dict) -> str:
    content = reply["choices"][0]["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError("content")
    return content or ""


def _pause(reply, number: int) -> float:
    """Seconds before try `number` + 2: what the reply asks for, as a number or as a date, else 2^number."""
    asked = "" if reply is None else reply.headers.get("retry-after", "")
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return min(2.0**number, _LONGEST)


def _shown(text: str, key: str | None) -> str:
    """The beginning of a text on one line, without the key, which some servers repeat."""
    words = " ".join((text.replace(key, "***") if key else text).split())
    return repr(words if len(words) <= _SHOWN else f"{words[:_SHOWN]}...")


def _checked(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.username is not None or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ValueError(f"endpoint: url must be http(s)://HOST[:PORT][/PATH]; got {url!r}. Most end in /v1.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/embeddings")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _httpx() -> ModuleType:
    """The HTTP client that huggingface_hub brings, under the name that its version gives it."""
    found = next((name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)), "httpx")
    return lookup.package(found, "engine")


@functools.cache
def _certificates():
    return _httpx().create_ssl_context()
