"""A conversation in the terminal, with a model here or with a server elsewhere.

Owns: the loop of question and answer, commands that begin with a slash, how answers are shown.
Does not know: how a model is loaded (`cli.py` hands in a `Source`), ranks, chat templates.
Invariant: Ctrl-C ends the answer and never the program, Ctrl-D leaves; a question that was refused
is not in the conversation; where stdin or stdout is no terminal every line is a question and stdout
has the answers alone.
Next: `Talk.loop`.
"""

from __future__ import annotations

import json
import math
import os
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.padding import Padding
from rich.segment import Segment
from rich.text import Text

from ..core.chat import OutputPart
from ..errors import CenacleError, ClusterError, InputError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from ..api import Model

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 900.0  # deadlines of a remote server


@dataclass(frozen=True)
class ChatSettings:
    """How answers are made; None: the model's or the server's own way."""

    max_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int | None = None


class ChatSource(Protocol):
    """What answers."""

    name: str

    def answer(self, messages: list[dict[str, str]], how: ChatSettings) -> Iterator[OutputPart]:
        """The parts of an answer, about one a token; ending the iteration ends the answer."""
        ...


class LocalChat:
    """A model that is loaded in this program."""

    def __init__(self, model: Model) -> None:
        self.name, self._model = model.name, model

    def answer(self, messages: list[dict[str, str]], how: ChatSettings) -> Iterator[OutputPart]:
        """See `Source`."""
        tokens = self._model.tokens_of(messages)
        stream = self._model.text.chat((), (), tokens)
        sampling: dict[str, Any] = {
            "temperature": how.temperature,
            "top_p": how.top_p,
            "seed": how.seed,
        }
        for chunk in self._model.stream(tokens, how.max_tokens, **sampling):
            yield from stream.add(chunk.token)
        yield from stream.end()


class RemoteChat:
    """A server with OpenAI's API: this program's, or any other.

    Args:
        url: with or without /v1.
        key: sent as `Authorization: Bearer`.
        model: its name there; None: the first that the server lists.
        certificate: a file with the server's own certificate, if it made it itself.

    Raises:
        InputError: the address is none, or the server wants another key.
        ClusterError: it does not answer.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        model: str | None = None,
        certificate: Path | None = None,
    ) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise InputError(f"url: expected http://HOST:PORT or https://, got {url!r}", "url")
        try:
            trusted = ssl.create_default_context(cafile=certificate)
            self._client = httpx.Client(
                base_url=base,
                headers={"authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                verify=trusted,
            )
        except (OSError, ValueError, httpx.InvalidURL) as error:
            raise InputError(f"url: {url!r} cannot be used: {error}", "url") from error
        try:
            with _translate_errors(base):
                answer = self._client.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
                _raise_for_status(answer, base)
                names = [m["id"] for m in answer.json()["data"]]
                self.name = model or names[0]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def answer(self, messages: list[dict[str, str]], how: ChatSettings) -> Iterator[OutputPart]:
        """See `Source`."""
        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "stream": True,
            "max_tokens": how.max_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
        }
        if how.seed is not None:
            body["seed"] = how.seed
        base = str(self._client.base_url).rstrip("/")
        with (
            _translate_errors(base),
            self._client.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            if answer.is_error:
                answer.read()
            _raise_for_status(answer, base)
            for line in answer.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    yield from _parse_chunk(json.loads(data), base)
        raise ClusterError(f"{base}: the connection ended before the answer did")


@contextmanager
def _translate_errors(base: str) -> Iterator[None]:
    """Around what a server may spoil: its errors become ours."""
    try:
        yield
    except httpx.HTTPError as error:
        raise ClusterError(
            f"{base} does not answer ({error or type(error).__name__}); is a server running "
            f"there? Start one with `cenacle serve`"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ClusterError(f"{base} is no server with OpenAI's API: {error!r}") from error


def _raise_for_status(answer: httpx.Response, base: str) -> None:
    if answer.is_success:
        return
    try:
        said = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = f"status {answer.status_code}"
    if answer.status_code == 401:
        raise InputError(f"{base}: {said}; give it with --key or CENACLE_API_KEY", "key")
    if answer.status_code in (400, 404, 413, 422):
        raise InputError(f"{base}: {said}")
    raise ClusterError(f"{base}: {said}")


def _parse_chunk(chunk: dict[str, Any], base: str) -> Iterator[OutputPart]:
    if "error" in chunk:
        raise ClusterError(f"{base}: {chunk['error']['message']}")
    for choice in chunk["choices"][:1]:
        delta = choice["delta"]
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield OutputPart("reasoning", thought)
        if text := delta.get("content"):
            yield OutputPart("text", text)


# ---- commands

COMMANDS: dict[str, tuple[str, str]] = {
    "/help": ("", "this list"),
    "/new": ("", "begin again"),
    "/regenerate": ("", "another answer to the last question"),
    "/system": ("[TEXT]", "show or set the system prompt; /system - removes it"),
    "/temp": ("[NUMBER]", "show or set the temperature, 0 to 2"),
    "/max": ("[NUMBER]", "show or set the most tokens of an answer"),
    "/seed": ("[NUMBER]", "show or set the seed; /seed - makes it random"),
    "/save": ("FILE", "write the conversation, as JSON, or as Markdown if it ends in .md"),
    "/load": ("FILE", "go on with a conversation that was saved as JSON"),
    "/exit": ("", "leave; Ctrl-D does too"),
}
ALIASES = {"/bye": "/exit", "/quit": "/exit", "/again": "/regenerate", "/?": "/help"}
KEYS = (
    "Enter sends, Alt-Enter or a line that ends in \\ goes on in a new line, the arrows bring back "
    "earlier questions, Ctrl-C stops an answer; //x asks /x."
)


@dataclass
class ChatSession:
    """A conversation and what it is held with.

    Args:
        source: what answers.
        how: settings, which commands change.
        system: the system prompt.
    """

    source: ChatSource
    how: ChatSettings
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def loop(self, history: Path | None = None) -> None:
        """Ask and answer until the end of the input.

        Args:
            history: a file that keeps the questions for the arrow keys; None: they are forgotten.

        Raises:
            ClusterError: a model of this program has failed.
        """
        if sys.stdin.isatty() and sys.stdout.isatty():
            self._in_a_terminal(history)
        else:
            for line in sys.stdin:
                if not self._take(line.strip(), self._plainly):
                    return

    def _in_a_terminal(self, history: Path | None) -> None:
        screen = Console(highlight=False)
        screen.print(f"[bold]{_plain(self.source.name)}[/]  [dim]/help tells what there is[/]")
        session = _prompt_session(history)
        going = True
        while going:
            try:
                going = self._take(session.prompt("> ").strip(), lambda: self._richly(screen))
            except KeyboardInterrupt:
                continue  # the line is thrown away, or an answer that had not begun
            except EOFError:
                return

    def _take(self, said: str, show: Callable[[], str]) -> bool:
        """One line of input; False: to leave."""
        err = Console(stderr=True, highlight=False)
        try:
            if said.startswith("/") and not said.startswith("//"):
                return self._command(said, show, err)
            if said:
                self._ask(said.removeprefix("/") if said.startswith("//") else said, show)
        except InputError as error:
            err.print(f"[red]{_plain(str(error))}[/]", soft_wrap=True)
        except ClusterError as error:
            if isinstance(self.source, LocalChat):
                raise
            err.print(f"[red]{_plain(str(error))}[/]", soft_wrap=True)
        return True

    def _ask(self, question: str, show: Callable[[], str]) -> None:
        before = list(self.messages)
        self.messages.append({"role": "user", "content": question})
        try:
            answer = show()
        except (CenacleError, KeyboardInterrupt):
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": answer})

    def _command(self, said: str, show: Callable[[], str], err: Console) -> bool:
        word, _, rest = said.partition(" ")
        word, rest = ALIASES.get(word, word), rest.strip()
        tell = lambda text: err.print(_plain(text), soft_wrap=True)  # noqa: E731
        match word:
            case "/exit":
                return False
            case "/help":
                for name, (argument, what) in COMMANDS.items():
                    tell(f"{name + ' ' + argument:<18}{what}")
                tell(KEYS)
            case "/new":
                self.messages = []
            case "/regenerate":
                last = max(
                    (n for n, m in enumerate(self.messages) if m["role"] == "user"), default=None
                )
                if last is None:
                    raise InputError("/regenerate: there is no question yet")
                kept, self.messages = self.messages, self.messages[:last]
                try:
                    self._ask(kept[last]["content"], show)
                except (CenacleError, KeyboardInterrupt):
                    self.messages = kept
                    raise
            case "/system":
                if rest:
                    self.system = "" if rest == "-" else rest
                tell(f"system: {self.system or 'none'}")
            case "/temp":
                if rest:
                    self.how = replace(self.how, temperature=_parse_number(word, rest, 0, 2))
                tell(f"temperature: {self.how.temperature:g}")
            case "/max":
                if rest:
                    most = int(_parse_number(word, rest, 1, 1e9, whole=True))
                    self.how = replace(self.how, max_tokens=most)
                tell(f"most tokens: {self.how.max_tokens}")
            case "/seed":
                if rest:
                    seed = (
                        None
                        if rest == "-"
                        else int(_parse_number(word, rest, 0, 2**48, whole=True))
                    )
                    self.how = replace(self.how, seed=seed)
                tell(f"seed: {'random' if self.how.seed is None else self.how.seed}")
            case "/save":
                tell(f"saved as {self._save(rest)}")
            case "/load":
                self._load(rest)
                tell(f"{len(self.messages)} messages; the conversation goes on")
            case _:
                raise InputError(
                    f"{word}: no such command; /help lists them (to ask it write /{said})"
                )
        return True

    # ---- files

    def _save(self, name: str) -> Path:
        path = _parse_path("/save", name)
        if path.suffix == ".md":
            who = {"user": "You", "assistant": self.source.name}
            text = "\n\n".join(f"**{who[m['role']]}**\n\n{m['content']}" for m in self.messages)
        else:
            body = {"model": self.source.name, "system": self.system, "messages": self.messages}
            text = json.dumps(body, indent=1, ensure_ascii=False)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123
                file.write(text + "\n")
        except OSError as error:
            raise InputError(f"/save: cannot write {path}: {error}") from error
        return path

    def _load(self, name: str) -> None:
        path = _parse_path("/load", name)
        try:
            body = json.loads(path.read_text())
            messages = [{"role": m["role"], "content": m["content"]} for m in body["messages"]]
            system = body.get("system") or ""
            texts = [system, *(m["content"] for m in messages)]
            roles = {m["role"] for m in messages}
            if not all(isinstance(t, str) for t in texts) or not roles <= {"user", "assistant"}:
                raise ValueError("a message is not a user's or an assistant's text")
        except OSError as error:
            raise InputError(f"/load: cannot read {path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"/load: {path} is not what /save writes ({error})") from error
        self.messages, self.system = messages, system

    # ---- showing answers

    def _parts(self) -> Iterator[OutputPart]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return self.source.answer([*first, *self.messages], self.how)

    def _plainly(self) -> str:
        text = ""
        try:
            for part in self._parts():
                if part.kind == "text":
                    text += part.text
                    print(part.text, end="", flush=True)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        if text:
            print()
        return text

    def _richly(self, screen: Console) -> str:
        """An answer as Markdown while it comes: what is complete is printed for good, what is
        being written is drawn again."""
        text = thought = ""
        shown = count = 0
        stopped = False
        began = time.perf_counter()
        first = last = 0.0
        with Live(console=screen, refresh_per_second=12, vertical_overflow="crop") as live:
            try:
                for part in self._parts():
                    last = time.perf_counter()
                    first = first or last
                    count += 1
                    if part.kind == "reasoning":
                        thought += part.text
                        live.update(_Tail(Text(thought.strip(), style="dim italic")))
                        continue
                    text += part.text
                    if thought:
                        live.console.print(
                            Padding(Text(thought.strip(), style="dim"), (0, 0, 1, 2))
                        )
                        thought = ""
                    if done := stable_prefix_length(text[shown:]):
                        live.console.print(Markdown(text[shown : shown + done]))
                        live.console.print()
                        shown += done
                    live.update(_Tail(Markdown(text[shown:])))
            except KeyboardInterrupt:
                stopped = True
            live.update(Markdown(text[shown:]) if text[shown:].strip() else Text(""))
        notes = []
        if count > 1 and last > first:
            notes.append(f"{(count - 1) / (last - first):.1f} tokens/s")
        if count:
            notes.append(f"first after {first - began:.2f} s")
        if stopped:
            notes.append("stopped")
        screen.print(f"[dim]{' · '.join(notes)}[/]")
        return text


def stable_prefix_length(text: str) -> int:
    """How many characters of a Markdown text that is being written will not change any more: up to
    the last empty line outside code, unless what follows may belong to the same list or quote."""
    done = at = 0
    fence, before_blank = "", False
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if fence:
            if bare.startswith(fence) and not bare.strip(fence[0]):
                fence = ""
        else:
            if before_blank and bare and not line.startswith((" ", "\t", "-", "*", "+", ">", "|")):
                done = done if bare[0].isdigit() else at
            if bare.startswith(("```", "~~~")):
                fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
        before_blank = not bare and not fence
        at += len(line)
    return done


class _Tail:
    """Of what does not fit the screen the end is shown."""

    def __init__(self, inner: Markdown | Text) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._inner, options, pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def _prompt_session(history: Path | None) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    kept: FileHistory | InMemoryHistory = InMemoryHistory()
    if history is not None:
        try:
            history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
            kept = FileHistory(str(history))
        except OSError:
            pass  # then it is not kept
    session: PromptSession[str] = PromptSession(
        history=kept,
        multiline=True,
        key_bindings=keys,
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
        prompt_continuation=lambda width, *_: " " * width,
    )
    return session


def _parse_number(word: str, text: str, low: float, high: float, *, whole: bool = False) -> float:
    try:
        number = float(int(text) if whole else float(text))
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        kind = "a whole number" if whole else "a number"
        raise InputError(f"{word}: expected {kind} from {low:g} to {high:g}, got {text!r}")
    return number


def _parse_path(word: str, name: str) -> Path:
    if not name:
        raise InputError(f"{word}: expected a file, got none")
    return Path(name).expanduser()


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
