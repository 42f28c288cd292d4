"""A conversation in the terminal.

Owns: the loop of questions and answers, slash commands, how answers are shown.
Does not know: what answers (a `ChatSource`), ranks, chat templates.
Invariant: Ctrl-C ends an answer, never the program; Ctrl-D exits. A question that was refused is
not part of the conversation. Without a terminal every line of stdin is a question, and stdout gets
the answers alone.
Next: `ChatSession.run`.
"""

from __future__ import annotations

import base64
import difflib
import json
import math
import mimetypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.markup import escape
from rich.padding import Padding
from rich.segment import Segment
from rich.text import Text

from ..core.chat import Message, OutputPart
from ..errors import CenacleError, ClusterError, InputError, printable
from ..images.placement import mark_parts
from ..images.sources import MAX_FILE_BYTES
from .chat_sources import ChatSettings, ChatSource, LocalChat
from .console import draw_bar, join_fitting, report, stderr_console

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

MAX_TEXT_FILE_BYTES = 1_000_000
LEAST_PARTS = 4  # of an answer that has a speed; the first one does not count

COMMANDS: dict[str, tuple[str, str]] = {
    "/help": ("", "list the commands"),
    "/new": ("", "start a new conversation"),
    "/regenerate": ("", "answer the last question again"),
    "/system": ("[TEXT]", "show or set the system prompt; /system - removes it"),
    "/temp": ("[NUMBER]", "show or set the temperature, 0 to 2"),
    "/max": ("[NUMBER]", "show or set the maximum number of tokens per answer"),
    "/seed": ("[NUMBER]", "show or set the seed; /seed - makes it random"),
    "/edit": ("[TEXT]", "ask the last question again in other words"),
    "/back": ("", "return to what was there before /edit or /regenerate, and forth"),
    "/model": ("[NAME]", "show the models of the server, or choose one"),
    "/experts": ("", "show which experts worked"),
    "/file": ("FILE", "attach a text file to the next question"),
    "/image": ("FILE", "show a picture with the next question"),
    "/save": ("FILE", "save the conversation as JSON, or as Markdown if FILE ends in .md"),
    "/load": ("FILE", "continue a conversation that was saved as JSON"),
    "/exit": ("", "exit, like Ctrl-D"),
}
ALIASES = {"/bye": "/exit", "/quit": "/exit", "/again": "/regenerate", "/?": "/help"}
KEYS_HELP = (
    "Enter sends. Alt-Enter, or \\ at the end of a line, starts a new line. The arrow keys recall "
    "earlier questions, Ctrl-R searches them. Ctrl-C stops an answer. //x sends /x."
)


@dataclass
class ChatSession:
    """A conversation.

    Args:
        source: generates the answers.
        settings: can be changed by commands.
        system: the system prompt.
        images: pictures that go with the next question, as data: URIs.
        files: text files that do, as Markdown.
    """

    source: ChatSource
    settings: ChatSettings
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    branch: list[Message] = field(default_factory=list)  # to which /back returns
    draft: str = ""  # what the line of input begins with
    tokens_per_s: float = 0.0  # of the last answer, or of this one so far; 0: unknown

    def run(self, history: Path | None = None) -> None:
        """Read questions and show answers until the end of the input.

        Args:
            history: file that keeps the questions for the arrow keys; None: they are not kept.

        Raises:
            ClusterError: a model of this process has failed.
        """
        if sys.stdin.isatty() and sys.stdout.isatty():
            self._run_in_terminal(history)
        else:
            for line in sys.stdin:
                if not self._handle_line(line.strip(), self._show_plain):
                    return

    def _run_in_terminal(self, history: Path | None) -> None:
        console = Console(highlight=False)
        console.print(f"[bold]{escape(self.source.name)}[/]  [dim]/help lists the commands[/]")
        prompt = _create_prompt(history, self.describe_status)
        running = True
        while running:
            try:
                draft, self.draft = self.draft, ""
                line = prompt.prompt("> ", default=draft).strip()
                running = self._handle_line(line, lambda: self._show_markdown(console))
            except KeyboardInterrupt:
                continue  # discards the line, or an answer that had not begun
            except EOFError:
                return

    def _handle_line(self, line: str, show_answer: Callable[[], str]) -> bool:
        """Handle one line of input; False: exit."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                return self._run_command(line, show_answer)
            if line:
                self._ask(line.removeprefix("/") if line.startswith("//") else line, show_answer)
        except InputError as error:
            _print_error(error)
        except ClusterError as error:
            if isinstance(self.source, LocalChat):
                raise
            _print_error(error)
        return True

    def _ask(self, question: str | list[Any], show_answer: Callable[[], str]) -> None:
        previous, images = list(self.messages), self.images
        if self.files and isinstance(question, str):
            question, self.files = "\n\n".join([*self.files, question]), []
        content = question
        if images and isinstance(question, str):
            pictures = [{"type": "image_url", "image_url": {"url": image}} for image in images]
            content = [*pictures, {"type": "text", "text": question}]
            self.images = []
        self.messages.append({"role": "user", "content": content})
        try:
            answer = show_answer()
        except (CenacleError, KeyboardInterrupt):
            self.messages = previous
            raise
        self.messages.append({"role": "assistant", "content": answer})

    # ---- commands

    def _run_command(self, line: str, show_answer: Callable[[], str]) -> bool:
        name, _, argument = line.partition(" ")
        name, argument = ALIASES.get(name, name), argument.strip()
        match name:
            case "/exit":
                return False
            case "/help":
                for command, (arguments, text) in COMMANDS.items():
                    report(f"{command + ' ' + arguments:<18}{text}")
                report(KEYS_HELP)
            case "/new":
                self.branch = self.messages
                self.messages, self.images, self.files = [], [], []
            case "/file":
                self.files.append(read_text_file(_parse_path("/file", argument)))
                report(f"{len(self.files)} with the next question")
            case "/edit":
                self._edit(argument, show_answer)
            case "/back":
                if not self.branch:
                    raise InputError("/back: nothing was edited or regenerated")
                self.messages, self.branch = self.branch, self.messages
                report(f"back: {len(self.messages)} messages; /back again returns")
            case "/model":
                self._choose_model(argument)
            case "/experts":
                for row in draw_routing(self.source.routing_counts(), Console().width):
                    report(row)
            case "/image":
                self.images.append(read_image(_parse_path("/image", argument)))
                report(f"{len(self.images)} with the next question")
            case "/regenerate":
                self._regenerate(show_answer)
            case "/save":
                report(f"saved as {self._save(argument)}")
            case "/load":
                self._load(argument)
                report(f"loaded {len(self.messages)} messages")
            case "/system" | "/temp" | "/max" | "/seed":
                self._change_setting(name, argument)
            case _:
                raise InputError(
                    f"{name}: unknown command; /help lists the commands (to send it, write /{line})"
                )
        return True

    def _change_setting(self, name: str, argument: str) -> None:
        """Set a value if there is an argument, and show it."""
        if argument:
            match name:
                case "/system":
                    self.system = "" if argument == "-" else argument
                case "/temp":
                    temperature = _parse_number(name, argument, 0, 2)
                    self.settings = replace(self.settings, temperature=temperature)
                case "/max":
                    max_tokens = _parse_integer(name, argument, 1, 10**9)
                    self.settings = replace(self.settings, max_tokens=max_tokens)
                case "/seed":
                    seed = None if argument == "-" else _parse_integer(name, argument, 0, 2**48)
                    self.settings = replace(self.settings, seed=seed)
        settings = self.settings
        report(
            {
                "/system": f"system prompt: {self.system or 'none'}",
                "/temp": f"temperature: {settings.temperature:g}",
                "/max": f"max tokens: {settings.max_tokens}",
                "/seed": f"seed: {'random' if settings.seed is None else settings.seed}",
            }[name]
        )

    def _edit(self, text: str, show_answer: Callable[[], str]) -> None:
        """Ask the last question anew; without a text it is put into the line of input."""
        indices = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not indices:
            raise InputError("/edit: there is no question yet")
        previous, last = list(self.messages), indices[-1]
        self.messages = self.messages[:last]
        if not text:
            self.branch, self.draft = previous, _text_of(previous[last]["content"])
            return
        try:
            self._ask(text, show_answer)
        except (CenacleError, KeyboardInterrupt):
            self.messages = previous
            raise
        self.branch = previous

    def _choose_model(self, name: str) -> None:
        models = self.source.list_models()
        if name:
            if name not in models:
                near = difflib.get_close_matches(name, models, 3, 0)
                raise InputError(f"/model: no model {name!r}; nearest: {', '.join(near)}")
            self.source.name = name
        for model in models:
            report(f"{'*' if model == self.source.name else ' '} {model}")

    def _describe_context(self) -> list[str]:
        """How full the context is, in a few words."""
        used, length = self.source.context_used, self.source.context_length
        if not used:
            return []
        return [f"{used:,} of {length:,} tokens ({used / length:.0%})" if length else f"{used:,}"]

    def describe_status(self, width: int) -> str:
        """How full the context is, the speed and the model, as far as they fit on a line."""
        speed = [f"{self.tokens_per_s:.1f} tokens/s"] if self.tokens_per_s else []
        used, length = self.source.context_used, self.source.context_length
        forms = self._describe_context()
        if used and length:
            share = used / length
            forms = [f"{draw_bar(share, 8, '░')} {forms[0]}", *forms, f"{share:.0%} of {length:,}"]
        # The longest form beside which there is room for the speed.
        context = next((f for f in forms if len(" · ".join([f, *speed])) <= width), "")
        return join_fitting(
            [*filter(None, [context]), *speed, printable(self.source.name)], width, " · "
        )

    def _regenerate(self, show_answer: Callable[[], str]) -> None:
        indices = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not indices:
            raise InputError("/regenerate: there is no question yet")
        previous, self.messages = self.messages, self.messages[: indices[-1]]
        try:
            self._ask(previous[indices[-1]]["content"], show_answer)
        except (CenacleError, KeyboardInterrupt):
            self.messages = previous
            raise
        self.branch = previous

    def _save(self, name: str) -> Path:
        path = _parse_path("/save", name)
        if path.suffix == ".md":
            names = {"user": "You", "assistant": self.source.name}
            text = "\n\n".join(
                f"**{names[m['role']]}**\n\n{_text_of(m['content'])}" for m in self.messages
            )
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
            texts = [system, *(m["content"] for m in mark_parts(messages))]
            roles = {m["role"] for m in messages}
            if not all(isinstance(t, str) for t in texts) or not roles <= {"user", "assistant"}:
                raise ValueError("a message is not text of user or assistant")
        except OSError as error:
            raise InputError(f"/load: cannot read {path}: {error}") from error
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"/load: {path} was not written by /save ({error})") from error
        self.messages, self.system = messages, system

    # ---- answers

    def _answer_parts(self) -> Iterator[OutputPart]:
        system: list[Message] = []
        if self.system:
            system = [{"role": "system", "content": self.system}]
        return self.source.answer([*system, *self.messages], self.settings)

    def _show_plain(self) -> str:
        text = ""
        try:
            for part in self._answer_parts():
                if part.kind == "text":
                    text += part.text
                    print(part.text, end="", flush=True)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        if text:
            print()
        return text

    def _show_markdown(self, console: Console) -> str:
        """Show an answer as Markdown while it streams. Complete blocks are printed for good; the
        unfinished one is redrawn."""
        text = reasoning = ""
        printed = parts = 0
        stopped = False
        start = time.perf_counter()
        first = last = self.tokens_per_s = 0.0
        with Live(console=console, refresh_per_second=12, vertical_overflow="crop") as live:
            try:
                for part in self._answer_parts():
                    last = time.perf_counter()
                    first = first or last
                    parts += 1
                    if parts >= LEAST_PARTS and last > first:
                        self.tokens_per_s = (parts - 1) / (last - first)
                    if part.kind == "reasoning":
                        reasoning += part.text
                        tail = Text(reasoning.strip(), style="dim italic")
                        live.update(_Tail(tail, self.describe_status))
                        continue
                    text += part.text
                    if reasoning:
                        dimmed = Text(reasoning.strip(), style="dim")
                        live.console.print(Padding(dimmed, (0, 0, 1, 2)))
                        reasoning = ""
                    if stable := stable_prefix_length(text[printed:]):
                        live.console.print(Markdown(text[printed : printed + stable]))
                        live.console.print()
                        printed += stable
                    live.update(_Tail(Markdown(text[printed:]), self.describe_status))
            except KeyboardInterrupt:
                stopped = True
            live.update(Markdown(text[printed:]) if text[printed:].strip() else Text(""))
        notes = []
        if self.tokens_per_s:
            notes.append(f"{self.tokens_per_s:.1f} tokens/s")
        if parts:
            notes.append(f"first token after {first - start:.2f} s")
        notes += self._describe_context()
        if stopped:
            notes.append("stopped")
        console.print(f"[dim]{' · '.join(notes)}[/]")
        return text


BLOCKS = " ▁▂▃▄▅▆▇█"
MOST_ROUTING_ROWS = 24


def draw_routing(counts: Sequence[Sequence[int]], width: int) -> list[str]:
    """A line for each MoE layer, a character for each expert: the higher, the more often the router
    chose it.

    Args:
        counts: by layer and expert, how often it was chosen.
        width: columns; of more experts than that neighbors share one, which shows their busiest.

    Returns:
        The lines: of many layers evenly chosen ones, at most `MOST_ROUTING_ROWS`.
    """
    if not any(map(sum, counts)):
        return ["no step was measured yet: ask a question first"]
    room = max(8, width - 6)
    step = -(-len(counts) // MOST_ROUTING_ROWS)
    lines = []
    for index in range(0, len(counts), step):
        row = counts[index]
        share = -(-len(row) // room)
        cells = [max(row[at : at + share]) for at in range(0, len(row), share)]
        top = max(cells) or 1
        lines.append(f"{index:>4}  " + "".join(BLOCKS[-(-8 * cell // top)] for cell in cells))
    lines.append(
        f"{len(counts)} layers (rows), {len(counts[0])} experts; full: the layer's busiest"
    )
    return lines


def read_image(path: Path) -> str:
    """A picture as a data: URI.

    Raises:
        InputError: the file cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"image: cannot read {path}: {error.strerror}", "image") from error
    if not 0 < len(data) <= MAX_FILE_BYTES:
        got = f"{len(data):,}" if not data else "more"
        raise InputError(
            f"image: {path}: expected 1 to {MAX_FILE_BYTES:,} bytes, got {got}", "image"
        )
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    kind = kind if kind.startswith("image/") else "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def read_text_file(path: Path) -> str:
    """A text file as Markdown: its name, and its text between fences that it does not have.

    Raises:
        InputError: it cannot be read, is no UTF-8 text or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise InputError(f"/file: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"/file: {path}: expected UTF-8 text; attach pictures with /image"
        ) from error
    if len(data) > MAX_TEXT_FILE_BYTES:
        raise InputError(f"/file: {path}: expected at most {MAX_TEXT_FILE_BYTES:,} bytes, got more")
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{path.name}\n{fence}\n{text.rstrip()}\n{fence}"


def _text_of(content: str | list[Any]) -> str:
    """A content for eyes."""
    if isinstance(content, str):
        return content
    return "\n\n".join(part.get("text", "(a picture)") for part in content)


def stable_prefix_length(text: str) -> int:
    """Length of the prefix of a streaming Markdown text that cannot change any more: up to the last
    empty line outside code, unless the next line may belong to the same list or quote."""
    stable = position = 0
    fence, after_blank = "", False
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if fence:
            if stripped.startswith(fence) and not stripped.strip(fence[0]):
                fence = ""
        else:
            continues = line.startswith((" ", "\t", "-", "*", "+", ">", "|"))
            if after_blank and stripped and not continues and not stripped[0].isdigit():
                stable = position
            if stripped.startswith(("```", "~~~")):
                fence = stripped[: len(stripped) - len(stripped.lstrip(stripped[0]))]
        after_blank = not stripped and not fence
        position += len(line)
    return stable


class _Tail:
    """The end of what does not fit the terminal, and a status below it."""

    def __init__(self, content: Markdown | Text, describe_status: Callable[[int], str]) -> None:
        self._content, self._describe_status = content, describe_status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        for line in lines[-max(1, console.height - 3) :]:
            yield from line
            yield Segment.line()
        yield Text(self._describe_status(console.width - 1), "dim", no_wrap=True)


def _create_prompt(
    history: Path | None, describe_status: Callable[[int], str]
) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.styles import Style

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    questions: FileHistory | InMemoryHistory = InMemoryHistory()
    if history is not None:
        try:
            history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
            questions = FileHistory(str(history))
        except OSError:
            pass  # then questions are not kept
    session: PromptSession[str] = PromptSession(
        history=questions,
        multiline=True,
        key_bindings=bindings,
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
        prompt_continuation=lambda width, *_: " " * width,
        bottom_toolbar=lambda: describe_status(get_app().output.get_size().columns - 1),
        style=Style.from_dict({"bottom-toolbar": "noreverse dim"}),
    )
    return session


def _print_error(error: CenacleError) -> None:
    stderr_console.print(Text(str(error), "red"), soft_wrap=True)


def _parse_number(command: str, text: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise InputError(f"{command}: expected a number from {low:g} to {high:g}, got {text!r}")
    return number


def _parse_integer(command: str, text: str, low: int, high: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise InputError(f"{command}: expected an integer from {low} to {high}, got {text!r}")
    return number


def _parse_path(command: str, name: str) -> Path:
    if not name:
        raise InputError(f"{command}: expected a file, got none")
    return Path(name).expanduser()
