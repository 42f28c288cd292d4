"""HTTP requests with one to three faults, made from the server's own description.

Owns: values of a JSON schema, and the faults: in values, in the body's bytes, in HTTP itself.
Does not know: connections, what must come of a request (`fuzz.py`).
Invariant: a request depends on the seed and its number only.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MODEL = "demo_model"
MAX_DEPTH = 6
TEXTS = ("What is 12 + 30?", "12 + 30", "a", "", "Grüße, 世界 \U0001f469‍\U0001f680", "x" * 300)
# By a property's name: what keeps a request cheap, or what the description does not tell.
USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), (1, 2)),
    **dict.fromkeys(("n_predict", "max_tokens_to_sample"), (1, 2)),
    "n": (1, 1, 2),
    "best_of": (1,),
    "min_tokens": (0, 1),
    "model": (MODEL,),
    "arguments": ("{}", '{"a": 1}', '{"city": "Paris", "days": [1, 2]}'),
    "pattern": ("[a-c]{1,3}", "(yes|no)"),
    "regex": ("[a-c]{1,3}", "(yes|no)"),
    "guided_regex": ("[a-c]{1,3}",),
    "grammar": ('start: "a" | "b"',),
    "guided_grammar": ('root ::= "a" | "b"', 'start: "a"'),
    "budget_tokens": (1024,),
    "tokens": ([1, 2, 3], []),
    "logit_bias": ({}, {"3": 1.5}),
}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict", "n", "best_of")
SCHEMAS: tuple[Any, ...] = (
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", 1, None]}, "maxItems": 3},
    {"$defs": {"n": {"type": ["null", "number"]}}, "anyOf": [{"$ref": "#/$defs/n"}]},
    {},
)
FORMS = {"$ref", "anyOf", "oneOf", "const", "enum", "type"}
SCHEMA_NAMES = {"schema", "parameters", "input_schema", "guided_json", "json_schema", "json"}
CHAT = [{"role": "user", "content": "What is 12 + 30?"}]
ANY: dict[str, tuple[Any, ...]] = {"messages": (CHAT,), "tool_choice": ("auto", "none")}

RAW = "\ue000"  # marks text that stands in the body as it is
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, -(2**63) - 1, 10**30, 1e300, -1e-300,
    f"{RAW}NaN", f"{RAW}Infinity", f"{RAW}-Infinity", f"{RAW}1e400", f"{RAW}-0", f"{RAW}0.0e-9",
    f"{RAW}{'9' * 400}", f"{RAW}{'9' * 5000}", f"{RAW}1{'0' * 50_000}", f"{RAW}01", f"{RAW}.5",
    "", " ", "x", "1", "true", "null", "\x00", "\x1b[2J\x1b]0;x\x07", "\u202eabc", "\ud800",
    "a\udfff", "\ud83d\ude00", "../../etc/passwd", "{{ 7 * 7 }}",
    "{% for x in range(10**9) %}{% endfor %}", "<|im_start|>system", "<|endoftext|>",
    "<tool_call>{", "%s%n{0}", "a" * 5000, "é" * 3000,
    [], [[]], [None], [1, "a", {}], {}, {"": None}, {"type": "text"}, {"type": ["text"]},
    {"type": "function"}, {"role": "user"}, {"$ref": "#"}, {"__proto__": {"a": 1}},
    [[1] * 600], ["a"] * 600, {str(n): n for n in range(600)},
)  # fmt: skip
# Costly: one in twenty of the faults that choose an odd value chooses one of these.
LARGE: tuple[Callable[[], Any], ...] = (
    lambda: "a " * 50_000,
    lambda: "\U0001f600" * 100_000,
    lambda: "x" * 1_000_000,
    lambda: [0] * 100_000,
    lambda: [{"role": "user", "content": "a"} for _ in range(11_000)],
    lambda: f"{RAW}{'[' * 900}{']' * 900}",
    lambda: f"{RAW}{'[' * 200_000}{']' * 200_000}",
    lambda: RAW + '{"a":' * 20_000 + "1" + "}" * 20_000,
    lambda: RAW + '{"anyOf":[' * 90 + "true" + "]}" * 90,
    lambda: f"{RAW}1{'0' * 900_000}",
)
CONSTRAINTS: tuple[Any, ...] = (
    "(", "(a+)+$", "a{100000}", "(a|b)*c{1000}", "(?=a)b", "\\p{L}{500}", "[z-a]", "\\", "a" * 3000,
    "start: start start", 'start: "a"{1000000}', "start:", "root ::= root",
    '%ignore /a*/\nstart: "', {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"}, {"type": "nothing"},
    {"pattern": "(a+)+$"},
    {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": 10**7}, {"enum": []},
    {"type": "string", "pattern": "("}, {"enum": [{"a": [1] * 50}] * 50}, {"const": "\ud800"},
    {"multipleOf": 0}, {"minimum": 5, "maximum": 1}, {"properties": 7}, {"required": "a"},
    {"allOf": [{"anyOf": [{"type": "string"}, {"$ref": "#"}]}] * 9}, {"format": "date-time"},
    {"patternProperties": {"^(x*)*$": {"type": "integer"}}}, {"not": {}}, {"uniqueItems": True},
    {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(300)}},
)  # fmt: skip


@dataclass
class FuzzRequest:
    """One request.

    Args:
        path: that it was made for.
        chunks: how the body is written; None: at once, with its length.
        head: the request's first bytes as they are; "": made of the members above.
        leave: the client closes the connection when it has sent this.
        breaks_http: a server may answer with a page of its own, or close the connection.
        faults: what was done.
    """

    path: str
    method: str = "POST"
    target: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    chunks: list[bytes] | None = None
    raw_end: bytes = b""
    leave: bool = False
    breaks_http: bool = False
    faults: list[str] = field(default_factory=list)

    def encode(self) -> bytes:
        """All that is sent."""
        lines = [f"{self.method} {self.target or self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        head = "\r\n".join(lines).encode("utf-8", "surrogatepass")
        if self.chunks is None:
            return head + b"\r\n\r\n" + self.body + self.raw_end
        pieces = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in self.chunks)
        return head + b"\r\n\r\n" + pieces + (self.raw_end or b"0\r\n\r\n")


class RequestMaker:
    """Makes requests.

    Args:
        description: the server's /openapi.json.
        seed: of all requests.
        host: of the Host header.
    """

    def __init__(self, description: dict[str, Any], seed: int, host: str) -> None:
        self._schemas: dict[str, Any] = description["components"]["schemas"]
        self._seed, self._host = seed, host
        self._bodies = {
            path: methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            for path, methods in sorted(description["paths"].items())
            if "post" in methods
        }
        self._names = sorted({n for s in self._schemas.values() for n in s.get("properties", ())})
        weights = {"/v1/chat/completions": 4, "/v1/responses": 3, "/v1/messages": 3}
        self._paths = [path for path in self._bodies for _ in range(weights.get(path, 1))]

    @property
    def paths(self) -> list[str]:
        """The paths that take a body."""
        return list(self._bodies)

    def make(self, number: int, faults: int | None = None) -> FuzzRequest:
        """A request; `faults`: 0 for a good one, None for one to three."""
        dice = random.Random(f"{self._seed}/{number}")
        path = dice.choice(self._paths)
        value = self.sample(self._bodies[path], dice)
        request = FuzzRequest(path, headers=[("host", self._host)])
        count = dice.choice((1, 1, 2, 3)) if faults is None else faults
        kinds = [dice.choices(("value", "bytes", "http"), (16, 2, 3))[0] for _ in range(count)]
        for _ in range(kinds.count("value")):
            request.faults.append(self._damage_value(value, dice))
        request.body = to_json(value)
        for _ in range(kinds.count("bytes")):
            change = dice.choice(BYTE_FAULTS)
            request.body = change(request.body, dice)
            request.faults.append(change.__name__)
        request.headers += [("content-type", "application/json")]
        if "http" in kinds:  # one: two would hide each other
            fault = dice.choice(HTTP_FAULTS)
            fault(request, dice)
            request.faults.append(fault.__name__)
        if len(request.body) > 50_000_000:  # such a body may be refused before it is read
            request.breaks_http = True
        names = {name.lower() for name, _ in request.headers}
        if request.chunks is not None:
            request.headers.append(("transfer-encoding", "chunked"))
        elif "content-length" not in names:
            request.headers.append(("content-length", str(len(request.body))))
        return request

    # ---- Good values --------------------------------------------------------------------------

    def sample(self, schema: Any, dice: random.Random, name: str = "", depth: int = 0) -> Any:
        """A value that a schema describes, mostly."""
        if not isinstance(schema, dict) or not FORMS & schema.keys():
            return copy.deepcopy(dice.choice(ANY.get(name, (1, "a", {}, []))))
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rsplit("/", 1)[1]]
            return self.sample(schema, dice, name, depth)
        if name in SCHEMA_NAMES and "$ref" not in str(schema):
            return copy.deepcopy(dice.choice(SCHEMAS))
        if name in USUAL and name != "parameters":
            return copy.deepcopy(dice.choice(USUAL[name]))
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                forms = [form for form in schema[keyword] if form != {"type": "null"}]
                return self.sample(dice.choice(forms), dice, name, depth)
        if "const" in schema or "enum" in schema:
            return dice.choice([schema["const"]] if "const" in schema else schema["enum"])
        return self._sample_type(schema, dice, name, depth)

    def _sample_type(
        self, schema: dict[str, Any], dice: random.Random, name: str, depth: int
    ) -> Any:
        kind = schema.get("type")
        if kind == "object":
            return self._sample_object(schema, dice, depth)
        if kind == "array":
            fewest = schema.get("minItems", 0)
            count = max(fewest, dice.choice((0, 1, 1, 2, 3)) if depth < MAX_DEPTH else 0)
            count = max(count, 1) if name in ("messages", "input") else count
            return [self.sample(schema.get("items", {}), dice, "", depth + 1) for _ in range(count)]
        if kind in ("integer", "number"):
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
            low, high = max(low, -3), min(schema.get("maximum", 9), 9)
            number = dice.randint(int(low), max(int(low), int(high)))
            fraction = dice.choice((0, 0.5)) if kind == "number" else 0
            return min(number + fraction, high) or (1 if "exclusiveMinimum" in schema else 0)
        if kind == "string":
            return "word_1" if "pattern" in schema else dice.choice(TEXTS)
        return {"boolean": dice.random() < 0.5, "null": None}.get(str(kind))

    def _sample_object(self, schema: dict[str, Any], dice: random.Random, depth: int) -> Any:
        properties, made = schema.get("properties", {}), {}
        required = set(schema.get("required", ()))
        if depth == 0:  # of several, those that the models require together
            required |= {n for n in ("messages", "input", "max_tokens") if n in properties}
            required |= {n for n in ("max_output_tokens",) if n in properties}
            if "content" in properties and "messages" in properties:  # /tokenize takes one of them
                required = {dice.choice(("prompt", "content", "messages"))}
        rest = [n for n in properties if n not in required]
        chance = min(0.5, 3 / max(1, len(rest))) if depth < MAX_DEPTH else 0.0
        sources = {"prompt", "content", "messages"} if "messages" in properties else set()
        for name, member in properties.items():
            chosen = dice.random() < chance and name not in (sources if depth == 0 else ())
            if name in required or chosen:
                made[name] = self.sample(member, dice, name, depth + 1)
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            made |= {
                word: self.sample(extra, dice, "", depth + 1) for word in "ab"[: dice.randint(0, 2)]
            }
        return made

    # ---- Faults in values ---------------------------------------------------------------------

    def _damage_value(self, value: Any, dice: random.Random) -> str:
        places = places_of(value)
        if not places:
            return "none"
        parent, key = dice.choice(places)
        if key in LIMITS and dice.random() < 0.8:  # most answers shall be short
            parent, key = dice.choice(places)
        kind = dice.choice(
            ("odd", "odd", "odd", "delete", "add", "twice", "form", "number", "text")
        )
        has_type = isinstance(parent, dict) and "type" in parent
        near = has_type or key in SCHEMA_NAMES or key in USUAL
        if near and dice.random() < 0.1:
            parent[key] = copy.deepcopy(dice.choice(CONSTRAINTS))
            return f"constraint at {key!s:.40}"
        if kind == "delete":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            name = dice.choice(
                (dice.choice(self._names), dice.choice(("", "a\x00b", "\ud800", "x" * 3000)))
            )
            parent[name] = odd_value(dice)
        elif kind == "twice" and isinstance(parent, dict):
            parent[f"{key}{RAW}"] = odd_value(dice)
        elif kind == "form":
            form = dice.choice((lambda v: [v], lambda v: {"a": v}, lambda v: [v] * 40, str))
            is_large = (
                len(str(parent[key])) > 100_000
            )  # forty of them, forty times, fill the memory
            parent[key] = [parent[key]] if is_large else form(parent[key])
        elif kind == "number" and isinstance(parent[key], int | float):
            number = parent[key]
            parent[key] = dice.choice(
                (-number, number + 1, number * 10**9, number + 0.5, str(number))
            )
        elif kind == "text" and isinstance(parent[key], str):
            text = parent[key]
            parent[key] = dice.choice(("\ud800", "\x00", "\ufeff", "\x7f", "a" * 3000)).join(
                (text, text)
            )
        else:
            parent[key] = odd_value(dice)
        return f"{kind} at {key!s:.40}"


def odd_value(dice: random.Random) -> Any:
    return dice.choice(LARGE)() if dice.random() < 0.02 else copy.deepcopy(dice.choice(ODD))


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """All members of a value: the list or object that they are in, and their index or name."""
    places: list[tuple[Any, Any]] = []
    rest = [value]
    while rest and len(places) < 2000:
        parent = rest.pop()
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        places += [(parent, key) for key in keys[:100]]
        rest += [parent[key] for key in keys[:100] if isinstance(parent[key], dict | list)]
    return places


def to_json(value: Any) -> bytes:
    """The text of a value. `RAW` before a string: it stands as it is; after a name: the name is
    there twice."""
    text = json.dumps(value)
    mark = json.dumps(RAW)[1:-1]
    parts = text.split(f'"{mark}')
    for at in range(1, len(parts)):
        raw, _, rest = parts[at].partition('"')
        if "\\" in raw:  # it has quotes
            raw, rest = _split_string(parts[at])
        parts[at] = raw + rest
    return "".join(parts).replace(mark, "").encode("utf-8", "surrogatepass")


def _split_string(text: str) -> tuple[str, str]:
    """A JSON string's content, whose quotes are escaped, and what follows it."""
    value, end = json.decoder.scanstring(text, 0)
    return value, text[end:]


# ---- Faults in bytes --------------------------------------------------------------------------


def cut(body: bytes, dice: random.Random) -> bytes:
    return body[: dice.randrange(len(body) + 1)]


def flip(body: bytes, dice: random.Random) -> bytes:
    changed = bytearray(body or b"{")
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def insert(body: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(body) + 1)
    piece = dice.choice(
        (b"\0", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b",", b"}", b"\\u12", b"//x\n")
    )
    return body[:at] + piece + body[at:]


def encode(body: bytes, dice: random.Random) -> bytes:
    text = body.decode("utf-8", "replace")
    return text.encode(
        dice.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp037")), "replace"
    )


def compress(body: bytes, dice: random.Random) -> bytes:  # noqa: ARG001
    return gzip.compress(body, 1)


def replace(body: bytes, dice: random.Random) -> bytes:  # noqa: ARG001
    whole = (b"", b"[]", b"7", b'"x"', b"null", b"NaN", b"{}{}", b"-", b"[{}]", b"{}", b"\xff" * 99)
    return dice.choice((*whole, dice.randbytes(300), b"[" * 100_000, b'{"a":' * 50_000))


def surround(body: bytes, dice: random.Random) -> bytes:
    before, after = dice.choice(
        ((b"", b"x"), (b"[", b"]"), (b"", body), (b" " * 9000, b""), (b"x", b""))
    )
    return before + body + after


BYTE_FAULTS = (cut, cut, flip, flip, insert, encode, compress, replace, surround)


# ---- Faults in HTTP ---------------------------------------------------------------------------


def content_type(request: FuzzRequest, dice: random.Random) -> None:
    kinds = ("text/plain", "application/xml", "multipart/form-data", "", "a/b; charset=utf-16", "é")
    request.headers[-1] = ("content-type", dice.choice(kinds))


def header(request: FuzzRequest, dice: random.Random) -> None:
    """A header that a client should not send so, but may."""
    request.headers.append(
        dice.choice(
            (
                ("content-encoding", "gzip"),
                ("content-encoding", "br, x"),
                ("accept", "application/xml;q=x"),
                ("accept-encoding", "\x80"),
                ("authorization", "Bearer " + "x" * 3000),
                ("authorization", "Basic ==="),
                ("x-api-key", "\u00e9\ud800"),
                ("origin", "null"),
                ("origin", "http://[::1"),
                ("cookie", "a=" + "b" * 5000),
                ("x-stainless-timeout", "-1"),
                ("connection", "upgrade"),
                ("upgrade", "websocket"),
                ("te", "trailers"),
                ("anthropic-version", "1"),
                ("anthropic-beta", "x" * 900),
                ("openai-organization", ""),
                ("x-forwarded-for", "1.2.3.4, \x7f"),
                ("range", "bytes=0-1"),
                ("if-none-match", "*"),
            )
        )
    )
    request.breaks_http = True  # some values are no header at all


def headers(request: FuzzRequest, dice: random.Random) -> None:
    kind = dice.choice(("many", "long", "no name", "folded", "host", "no host", "two hosts"))
    if kind == "many":
        request.headers += [(f"x-{n}", "y") for n in range(dice.choice((50, 300, 3000)))]
    elif kind == "long":
        request.headers.append(("x" * dice.choice((10, 70_000)), "y" * 70_000))
    elif kind == "no name":
        request.headers.append((dice.choice(("", " ", "a b", "a\x00", "é")), "x"))
    elif kind == "folded":
        request.headers.append(("x-a", "1\r\n 2\r\n\t3"))
    elif kind == "no host":
        del request.headers[0]
    else:
        hosts = (
            "",
            "evil.example",
            "[::1]evil",
            "a" * 300,
            "localhost:99999",
            "\u00e9",
            "127.0.0.1@x",
        )
        odd = ("host", dice.choice(hosts))
        request.headers = [odd, *request.headers[kind == "host" :]]
    request.breaks_http = True


def method(request: FuzzRequest, dice: random.Random) -> None:
    methods = (
        "GET",
        "PUT",
        "DELETE",
        "PATCH",
        "HEAD",
        "OPTIONS",
        "TRACE",
        "FOO",
        "post",
        "CONNECT",
        "",
    )
    request.method = dice.choice((*methods, "A" * 3000, "G\u00e9T"))
    request.breaks_http = True


def target(request: FuzzRequest, dice: random.Random) -> None:
    path = request.path
    changes = (
        f"{path}/", f"/{path}", f"{path}?{'a=b&' * 500}", f"{path}?placement=%00&steps=%ff",
        f"{path}%00",
        f"{path}%2f..%2f", "/../../etc/passwd", "/static/../../x", "*", "http://127.0.0.1/x",
        "x", "/v1/models/%ff%00", f"/v1/models/{'m' * 3000}", "/v1/responses/resp_x", "/%5c..%5c",
        f"{path}#a", "/v1/responses/%2e%2e/input_items", "/v1/embeddings", "/" + "a" * 70_000,
        f"{path} x", "/é\ud800",
        "/cluster?steps=1e999", "/metrics", "/openapi.json", "/v1/models",
    )  # fmt: skip
    request.target = dice.choice(changes)
    if dice.random() < 0.5:
        request.method = dice.choice(("GET", "DELETE"))
    request.breaks_http = True


def chunked(request: FuzzRequest, dice: random.Random) -> None:
    """The body in pieces, as a client may send it."""
    size = dice.choice((1, 7, 1000)) if len(request.body) < 5000 else 5000
    request.chunks = [request.body[at : at + size] for at in range(0, len(request.body), size)]


def bad_chunks(request: FuzzRequest, dice: random.Random) -> None:
    chunked(request, dice)
    ends = (
        b"zz\r\n",
        b"-1\r\n",
        b"ffffffffffffffffffff\r\n",
        b"0\r\nx: y\r\n\r\n",
        b"5\r\nab",
        b"\r\n\r\n",
    )
    request.raw_end = dice.choice(ends)
    request.breaks_http = request.leave = True


def length(request: FuzzRequest, dice: random.Random) -> None:
    right = len(request.body)
    values = (
        "-1",
        "x",
        "1e3",
        f"{right + 5}",
        f"{max(0, right - 1)}",
        "9" * 30,
        f"{right}, {right}",
        "",
        "+1",
    )
    request.headers.append(("content-length", dice.choice(values)))
    if dice.random() < 0.3:
        request.headers.append(("content-length", str(right)))
    request.breaks_http = request.leave = True


def both_lengths(request: FuzzRequest, dice: random.Random) -> None:
    chunked(request, dice)
    request.headers.append(("content-length", "3"))
    request.breaks_http = request.leave = True


def hang_up(request: FuzzRequest, dice: random.Random) -> None:
    """Leaves in the middle of the body, or before the answer."""
    if dice.random() < 0.5 and request.body:
        request.headers.append(("content-length", str(len(request.body))))
        request.body = request.body[: len(request.body) // 2]
    request.leave = request.breaks_http = True


def expect(request: FuzzRequest, dice: random.Random) -> None:
    request.headers.append(("expect", dice.choice(("100-continue", "200-ok", "100-continue, x"))))
    request.breaks_http = True


HTTP_FAULTS = (
    *(content_type, content_type, header, header, header, headers, method, method, target, target),
    *(chunked, chunked, bad_chunks, length, both_lengths, hang_up, hang_up, expect),
)
