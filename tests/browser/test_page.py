"""The page in a real browser, over a real server with two ranks of the demo model."""

import base64
import io
import json
import re
import selectors
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import cenacle

DEADLINE_S = 120  # for anything to happen on a busy machine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
END = json.loads((DEMO / "config.json").read_text())["eos_token_id"]
PROGRAM = f"""
import cenacle
from cenacle.net import bind
from cenacle.server.http_server import serve

sock = bind(port=0)
with cenacle.load({str(DEMO)!r}, nodes=2, placement="whole", latency_s=0.002) as model:
    serve(model, sock, lambda url: print(url, flush=True))
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    log = tmp_path_factory.mktemp("page") / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            with selectors.DefaultSelector() as waiting:
                waiting.register(process.stdout, selectors.EVENT_READ)
                assert waiting.select(timeout=DEADLINE_S), "the server did not start"
            found = process.stdout.readline().strip()
            assert found.startswith("http://"), log.read_text()
            yield found
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: the page was not tested; install Debian's chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="NO PLAYWRIGHT: pip install it")
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, url):
    """Opens the page; in the end it must have logged nothing and sent requests to no other host.

    With `refused=True` the browser's own messages about refused requests are expected, with
    `confined=True` those about what a policy forbids.
    """
    contexts, urls, messages = [], [], []

    def open_page(width=1280, height=860, refused=False, confined=False, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * DEADLINE_S)
        page.on("request", lambda r: urls.append(r.url))
        expected = ["Failed to load resource"] * refused + ["Content Security Policy"] * confined

        def note(message):
            if not any(text in message.text for text in expected):
                messages.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda e: messages.append(str(e)))
        page.goto(url)
        page.wait_for_selector("#messages > *")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [u for u in urls if not u.startswith((f"{url}/", "blob:"))] == []
    assert messages == []


def until(page, condition, arg=None, seconds=DEADLINE_S):
    """Wait for a condition; the page's policy forbids the `eval` of Playwright's own wait."""
    ends = time.monotonic() + seconds
    while not page.evaluate(condition, arg):
        assert time.monotonic() < ends, f"not within {seconds} s: {condition}"
        page.wait_for_timeout(20)


def ask(page, text):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def answers(page):
    """The finished answers' texts, when they are stored."""
    until(page, "!document.querySelector('.streaming') && document.querySelector('.stats')")
    stored(page)
    return [e.inner_text() for e in page.query_selector_all(".assistant .prose")]


def stored(page):
    until(page, "!document.documentElement.hasAttribute('data-writing')")


def endless(page):
    """Forbid the stop token, so that answers continue until they are stopped."""

    def change(route):
        body = route.request.post_data_json
        route.continue_(post_data=json.dumps({**body, "logit_bias": {str(END): -100}}))

    page.route("**/v1/chat/completions", change)


def test_conversations_are_asked_edited_and_stored(opened):
    page = opened()
    page.click("#open-settings")
    page.fill("[name=temperature]", "0")
    page.click("#settings .main")
    ask(page, "What is 12 + 30?")
    assert answers(page) == ["42"]
    stats = page.inner_text(".stats")
    # A short answer can come at once: then there is no rate to show.
    assert re.fullmatch(r"(\S+ tokens/s · )?first token after \S+ m?s · \d+ tokens", stats), stats
    page.click("[aria-label=Regenerate]")
    until(page, "document.querySelector('.branches')?.innerText === '2/2'")
    assert answers(page) == ["42"]
    ask(page, "What is 7 + 5?")
    until(page, "document.querySelectorAll('.stats').length === 2")
    assert answers(page) == ["42", "12"]
    page.keyboard.press("ArrowUp")  # in an empty field: edit the last question
    assert page.input_value("#input") == "What is 7 + 5?"
    ask(page, "What is 20 + 5?")
    until(page, "document.querySelector('.user:nth-child(3)').innerText.includes('20')")
    assert answers(page) == ["42", "25"]
    page.reload()
    assert answers(page) == ["42", "25"]
    # A second conversation, renamed, exported, deleted, brought back.
    page.click("#new")
    page.wait_for_selector(".empty")
    ask(page, "What is 1 + 1?")
    assert answers(page) == ["2"]
    assert [e.inner_text() for e in page.query_selector_all(".pick")] == [
        "What is 1 + 1?",
        "What is 12 + 30?",
    ]
    menu = page.locator("#conversations li").first
    menu.locator(".icon").click()
    menu.get_by_text("Rename").click()
    page.keyboard.type("Small sums")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.pick')?.innerText === 'Small sums'")
    menu.locator(".icon").click()
    with page.expect_download() as given:
        menu.get_by_text("Export as JSON").click()
    assert given.value.suggested_filename == "Small-sums.json"
    exported = json.loads(Path(given.value.path()).read_text())
    assert [m["content"] for m in exported["messages"]] == ["What is 1 + 1?", "2"]
    menu.locator(".icon").click()
    menu.get_by_text("Delete").click()
    until(page, "document.querySelectorAll('.pick').length === 1")
    page.get_by_text("Undo").click()
    until(page, "document.querySelectorAll('.pick').length === 2")


def test_an_answer_streams_and_can_be_stopped(opened, url):
    page = opened()
    endless(page)
    ask(page, "Spell otter backwards.")
    until(page, "document.querySelector('.streaming .prose')?.innerText.length > 10")
    before = page.inner_text(".streaming .prose")
    until(
        page,
        "n => document.querySelector('.streaming .prose').innerText.length > n",
        arg=len(before),
    )
    page.click("[aria-label=Stop]")
    (text,) = answers(page)
    assert text.startswith(before)
    assert page.inner_text(".stats").endswith("stopped")
    assert re.search(r"about \d+ tokens", page.inner_text(".stats"))
    ends = time.monotonic() + DEADLINE_S
    while httpx.get(f"{url}/health").json()["running"]:
        assert time.monotonic() < ends, "the server did not cancel the request"
    page.reload()
    assert answers(page) == [text]


def test_errors_are_explained(opened):
    page = opened(refused=True)
    page.route(
        "**/v1/chat/completions",
        lambda r: r.fulfill(status=429, headers={"retry-after": "3"}, body="{}"),
    )
    ask(page, "What is 12 + 30?")
    page.wait_for_selector(".error:not([hidden])")
    assert page.inner_text(".error") == "The server is busy. Try again in 3 s."
    page.unroute("**/v1/chat/completions")
    missing = {"message": "no model is loaded yet: 1 of 2 nodes are available (one)"}
    page.route(
        "**/v1/chat/completions",
        lambda r: r.fulfill(status=503, json={"error": {**missing, "code": "nodes_missing"}}),
    )
    page.click("[aria-label='Try again']")
    waiting = "The cluster is waiting for machines: 1 of 2 nodes are available (one). On each "
    page.wait_for_selector(f".error:has-text('{waiting}')")
    page.unroute("**/v1/chat/completions")
    page.click("[aria-label='Try again']")
    assert answers(page) == ["42"]


def test_an_api_key_is_requested_once_and_stored(opened):
    page = opened(refused=True)
    sent = []

    def check_key(route):
        sent.append(route.request.headers.get("authorization"))
        if sent[-1] == "Bearer open sesame":
            route.continue_()
        else:
            route.fulfill(status=401, body="{}")

    page.route(re.compile(r"/v1/|/cluster\?"), check_key)
    ask(page, "What is 12 + 30?")
    page.wait_for_selector("#key[open]")
    page.fill("#key input", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-title:has-text('not accepted')")
    page.fill("#key input", "open sesame")
    page.keyboard.press("Enter")
    assert answers(page) == ["42"]
    assert None in sent
    assert "Bearer wrong" in sent
    page.reload()
    sent.clear()
    page.click("[aria-label=Regenerate]")
    assert answers(page) == ["42"]
    assert set(sent) == {"Bearer open sesame"}


def test_markdown_makes_only_safe_elements(opened):
    page = opened()
    hostile = [
        "<img src=x onerror=alert(1)>",
        "<script>alert(1)</script>",
        "[a](javascript:alert(1))",
        "[a](data:text/html,x)",
        "[a](JaVaScRiPt:alert(1))",
        "[a](\tjavascript:alert(1))",
        "![a](http://127.0.0.1:9/pixel.png)",
        '[a](http://b"onmouseover="alert(1))',
        "<a href='javascript:alert(1)'>x</a>",
        "`<b>`\n\n```<i>\n<script>\n```",
        "| <b> |\n|---|\n| <img src=y> |",
        "<javascript:alert(1)>",
        "> - <svg onload=alert(1)>",
    ]
    found = page.evaluate(
        """async (texts) => {
          const { render } = await import("/static/markdown.js");
          return texts.map((text) => {
            const box = document.createElement("div");
            document.body.append(box);
            render(box, text);
            const all = [...box.querySelectorAll("*")];
            const out = {
              tags: all.map((e) => e.tagName.toLowerCase()),
              on: all.flatMap((e) => [...e.attributes]).map((a) => a.name),
              links: [...box.querySelectorAll("a")].map((a) => a.href),
            };
            box.remove();
            return out;
          });
        }""",
        hostile,
    )
    allowed = {
        *("p", "a", "span", "code", "pre", "figure", "figcaption", "button", "svg", "path", "div"),
        *("table", "thead", "tbody", "tr", "th", "td", "blockquote", "ul", "li", "br"),
    }
    for text, made in zip(hostile, found, strict=True):
        assert set(made["tags"]) <= allowed, text
        assert not [a for a in made["on"] if a.startswith("on") or a in ("src", "style")], text
        assert all(link.startswith("http://") for link in made["links"]), text


def test_markdown_is_rendered(opened):
    page = opened()
    cases = {
        "# T\ntext": '<h3 class="heading-1">T</h3><p>text</p>',
        # The outline has no gaps, whatever a model begins with.
        "### T\n> # q\n\n# U\n### V": '<h3 class="heading-3">T</h3><blockquote dir="auto">'
        '<p class="heading-1">q</p></blockquote><h3 class="heading-1">U</h3>'
        '<h4 class="heading-3">V</h4>',
        "a **b *c* d** `e<f`": "<p>a <strong>b <em>c</em> d</strong> <code>e&lt;f</code></p>",
        "snake_case_name 2*3*4": "<p>snake_case_name 2<em>3</em>4</p>",
        "1. a\n   - b\n2. c": '<ol dir="auto"><li>a<ul dir="auto"><li>b</li></ul></li>'
        "<li>c</li></ol>",
        "3. a": '<ol dir="auto" start="3"><li>a</li></ol>',
        "> a\n> b": '<blockquote dir="auto"><p>a<br>b</p></blockquote>',
        "---": "<hr>",
        "a ** b": "<p>a ** b</p>",
        "$5 and $10, US$ and $1": "<p>$5 and $10, US$ and $1</p>",
        "- [x] a": '<ul dir="auto"><li class="task"><input type="checkbox" disabled="" checked="" '
        'aria-label="Done">a</li></ul>',
        "a[^1]\n\n[^1]: b": '<p>a<sup class="mark"><button class="link" type="button" '
        'aria-label="Note 1">1</button></sup></p><div class="note" data-note="1" tabindex="-1">'
        "<sup>1</sup><div><p>b</p></div></div>",
        "see https://a.org/b_c.": '<p>see <a href="https://a.org/b_c" target="_blank" '
        'rel="noopener noreferrer">https://a.org/b_c</a>.</p>',
    }
    script = """async (texts) => {
      const { render } = await import("/static/markdown.js");
      const box = document.createElement("div");
      return texts.map((text) => { render(box, text); return box.innerHTML; });
    }"""
    for (text, want), got in zip(cases.items(), page.evaluate(script, list(cases)), strict=True):
        assert got == want, text
    # A streamed text ends like a complete one, and many unclosed marks are parsed quickly.
    text = "# A\n\ntext **b\nc** d\n\n- e\n- f\n\n```py\nx = 1\n\ny\n```\n\n|a|b|\n|-|-|\n|1|2|\n"
    marks = ["[", "**a ", "`", "_a ", "~~", "<", "> ", "- ", "![", "\\"]
    grown, whole, slow_ms, code = page.evaluate(
        """async ([text, marks]) => {
          const { render } = await import("/static/markdown.js");
          const [one, two] = [document.createElement("div"), document.createElement("div")];
          for (let i = 0; i <= text.length; i++) render(one, text.slice(0, i));
          render(two, text);
          const began = performance.now();
          for (const mark of marks) render(two.cloneNode(), mark.repeat(10000));
          const took = performance.now() - began;
          return [one.innerHTML, two.innerHTML, took, one.querySelector("pre").innerText];
        }""",
        [text, marks],
    )
    assert grown == whole
    assert code == "x = 1\n\ny"
    assert slow_ms < 1000 * DEADLINE_S  # not exponential


FORMULAS = r"""Inline $e^{i\pi}$ and \(a_1\).

$$
\sqrt{\vec{x}}
$$

Text
\[ \begin{pmatrix} a & b \end{pmatrix} \]

$\href{javascript:alert(1)}{x}$ $\includegraphics{http://127.0.0.1:9/a.png}$
$\htmlStyle{color:red}{x}$
$\frac{1$
"""


DIAGRAM = """graph LR
  A["<b onclick=alert(1)>Start</b>"] --> B[End]
  click A "javascript:alert(1)"
"""


def test_a_diagram_is_drawn_in_a_frame_that_can_do_nothing_else(opened):
    page = opened(confined=True)
    played(page, sse(f"```mermaid\n{DIAGRAM}```\n\n```mermaid\nnonsense <b>x</b>\n```"))
    ask(page, "Draw")
    answers(page)
    loaded = "performance.getEntriesByType('resource').some(r => /mermaid/.test(r.name))"
    assert not page.evaluate(loaded)
    page.click("text=Show as picture >> nth=0")
    until(page, "document.querySelector('iframe.drawn')?.clientHeight > 50")
    assert page.is_hidden("pre >> nth=0")
    (frame,) = (f for f in page.frames if f.url.endswith("/static/mermaid/frame.html"))
    assert "End" in frame.text_content("svg")
    assert frame.evaluate("origin") == "null"
    assert frame.evaluate("!document.querySelector('[onclick], svg script, a[href]')")
    alone = """async () => {
      try { parent.document; return "page"; } catch { }
      try { await fetch("/v1/models"); return "network"; } catch { return "alone"; }
    }"""
    assert frame.evaluate(alone) == "alone"
    assert page.locator("iframe").get_attribute("sandbox") == "allow-scripts"
    page.click("text=Show as text")
    assert page.is_visible("pre >> nth=0")
    assert page.locator("iframe").count() == 0
    page.click("text=Show as picture >> nth=1")
    until(page, "document.querySelector('.code .hint')?.innerText.includes('cannot be drawn')")
    assert page.is_visible("pre >> nth=1")


def test_formulas_are_typeset_and_nothing_else(opened):
    page = opened()
    assert not page.evaluate(
        "performance.getEntriesByType('resource').some(r => /katex/.test(r.name))"
    )
    render = """async (text) => {
      const { render } = await import("/static/markdown.js");
      window.box = document.createElement("div");
      document.querySelector("#messages").replaceChildren(box);
      render(box, text);
    }"""
    page.evaluate(render, FORMULAS)
    until(page, "document.querySelectorAll('.katex').length === 7")
    assert page.evaluate("document.querySelectorAll('.display .katex-display').length") == 2
    # What could load something or carry a style of its own is shown in red as its source.
    assert page.evaluate("!box.querySelector('a, img, [onclick], [href]')")
    assert page.inner_text(".wrong") == r"\frac{1"
    assert page.evaluate("[...box.querySelectorAll('annotation')].map((e) => e.textContent)")[
        :2
    ] == [
        r"e^{i\pi}",
        "a_1",
    ]
    # A text that grows ends as a complete one.
    grown, whole = page.evaluate(
        """async (text) => {
          const { render } = await import("/static/markdown.js");
          const [one, two] = [document.createElement("div"), document.createElement("div")];
          for (let i = 0; i <= text.length; i++) render(one, text.slice(0, i));
          render(two, text);
          return [one.innerHTML, two.innerHTML];
        }""",
        FORMULAS + "\n\\[\n- a\n# b\n> c\n\nd\n\\[\n- a\n# b\n> c\n\\]\n\ne[^1]\n\n[^1]: f\n  g",
    )
    assert grown == whole


CODE = {
    "python": ("def f(x):  # twice\n    return 'a' * 2", "call keyword comment string number"),
    "json": ('{"a": ["b", 1, true]}', "name string number keyword"),
    "rust": ("fn f<'a>(x: &'a str) -> char { 'c' }", "keyword string"),
    "html": ('<a href="x">y</a><!-- z -->', "key name string comment"),
    "diff": ("+a\n-b\n c", "inserted deleted"),
    "unknown": ("if x:\n  'a'", ""),
}


def test_code_is_colored_and_wrapped(opened):
    page = opened(390)
    found = page.evaluate(
        """async (cases) => {
          const { paint } = await import("/static/syntax.js");
          return cases.map(([language, text]) => {
            const [whole, grown] = [document.createElement("code"), document.createElement("code")];
            paint(whole, text, language);
            for (let i = 0; i <= text.length; i++) paint(grown, text.slice(0, i), language);
            const classes = new Set([...whole.children].map((e) => e.className.slice(5)));
            return [whole.textContent, [...classes], whole.innerHTML === grown.innerHTML];
          });
        }""",
        [[language, text] for language, (text, _) in CODE.items()],
    )
    for (language, (text, classes)), (shown, got, same) in zip(CODE.items(), found, strict=True):
        assert (shown, set(got), same) == (text, set(classes.split()), True), language
    wide = (
        "```py\nx = '"
        + "a b " * 60
        + "'\n```\n\n|a|b|\n|-|-|\n|"
        + "antidisestablishmentarianism|" * 2
    )
    page.evaluate(
        """async (text) => {
          const { render } = await import("/static/markdown.js");
          const box = document.createElement("div");
          box.className = "prose";
          document.querySelector("#messages").replaceChildren(box);
          render(box, text);
        }""",
        wide,
    )
    scrolls = "e => { const b = document.querySelector(e); return b.scrollWidth > b.clientWidth; }"
    assert page.evaluate(scrolls, "pre")
    assert page.evaluate(scrolls, ".wide")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("[aria-label='Wrap lines']")
    assert not page.evaluate(scrolls, "pre")
    assert (
        page.evaluate("document.querySelector('[aria-label=\"Wrap lines\"]').ariaPressed") == "true"
    )


def test_a_long_answer_is_drawn_once_while_it_streams(opened):
    """100 kB that grow: few elements are made more than once, counted, not timed."""
    page = opened()
    made, last, length, same = page.evaluate(
        """async () => {
          const { render } = await import("/static/markdown.js");
          const lines = (make) => Array.from({ length: 150 }, (_, i) => make(i)).join("\\n");
          const part = [
            "# Title",
            lines((i) => `- item **${i}** of a list`),
            "Text with *words*.\\n\\n".repeat(40),
            "| a | b |\\n|---|---|\\n" + lines((i) => `| ${i} | cell |`),
            "```python\\n" + lines((i) => `x_${i} = "text"  # note`) + "\\n```",
          ].join("\\n\\n");
          const text = (part + "\\n\\n").repeat(11);
          const box = document.createElement("div");
          let made = 0;
          const create = document.createElement.bind(document);
          document.createElement = (tag) => { made += 1; return create(tag); };
          for (let i = 0; i < text.length; i += 200) render(box, text.slice(0, i));
          render(box, text);
          const whole = create("div");
          document.createElement = create;
          render(whole, text);
          const same = box.innerHTML === whole.innerHTML;
          return [made, box.querySelectorAll("*").length, text.length, same];
        }"""
    )
    assert same
    assert length > 100_000
    assert made < 2 * last


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_cluster_view_on_a_phone_and_a_screen(opened, url, scheme):
    for width in (390, 1280):
        page = opened(width, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark")
        page.goto(f"{url}/#cluster")
        page.wait_for_selector("canvas")
        assert page.evaluate("document.querySelector('#view-cluster').scrollWidth") <= width
        page.wait_for_selector(".card-timings table")
        assert not re.search(r"\b(null|undefined|NaN)\b", page.inner_text("#cluster"))
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_heat_map_shows_the_routing_counts(opened, url):
    for question in ("What is 12 + 30?", "Spell otter backwards.") * 4:
        body = {
            "model": "demo_model",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 12,
        }
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S).is_success
    page = opened()
    page.click("#tab-cluster")
    page.wait_for_selector("canvas")
    ends = time.monotonic() + DEADLINE_S
    while True:  # counts and timings come apart from each other
        body = httpx.get(f"{url}/cluster", timeout=DEADLINE_S).json()
        counts, steps = body["routing"]["counts"], body["step_timings"]["steps"]
        sums = {sum(row) for row in counts}
        # A step that verifies drafts has more than one token.
        if steps > 3 and len(sums) == 1 and sums.pop() >= steps * body["plan"]["top_k"]:
            break
        assert time.monotonic() < ends, (counts, steps)
        time.sleep(0.1)
    for row in body["ranks"]:
        assert 0 < row["disk"]["free_bytes"] <= row["disk"]["total_bytes"]
        assert row["link"]["sent_bytes"] > 0
        assert row["link"]["latency_s"] is None, "no link between machines was measured"
    until(page, "/Disk free\\n.*Sent\\n/s.test(document.querySelector('.node').innerText)")
    until(page, f"document.body.innerText.includes('mean of {steps} measured')")
    box = page.locator("canvas").bounding_box()
    page.locator("canvas").focus()
    for layer in range(2):
        for expert in range(len(counts[0])):
            page.keyboard.press("ArrowRight" if expert else "ArrowDown" if layer else "ArrowRight")
            if expert == 0:
                for _ in range(len(counts[0])):
                    page.keyboard.press("ArrowLeft")
            text = page.inner_text(".tip")
            assert f"Layer {layer}, expert {expert}" in text
            assert f"on Node {0 if expert < 8 else 1}\n" in text
            assert re.search(rf"chosen {counts[layer][expert]} times?,", text), (layer, expert)
    # The pixels: an expert that fired most is of its node's full color.
    most = max(max(row) for row in counts)
    layer, expert = next((at, row.index(most)) for at, row in enumerate(counts) if most in row)
    page.mouse.move(0, 0)
    page.locator("#tab-cluster").focus()
    pixel = page.evaluate(
        """([layer, expert, layers, experts]) => {
          const canvas = document.querySelector("canvas");
          const scale = devicePixelRatio;
          const across = (canvas.width / scale - 34) / experts;
          const down = (canvas.height / scale - 16) / layers;
          const at = [34 + (expert + 0.5) * across, 16 + (layer + 0.5) * down];
          return [...canvas.getContext("2d").getImageData(at[0] * scale, at[1] * scale, 1, 1).data];
        }""",
        [layer, expert, len(counts), len(counts[0])],
    )
    color = page.evaluate(
        "n => getComputedStyle(document.querySelector(`.name .node-${n}`)).backgroundColor",
        0 if expert < 8 else 1,
    )
    assert pixel[:3] == [int(n) for n in re.findall(r"\d+", color)[:3]]
    assert box["width"] > 800


def test_eight_nodes_and_sixty_layers_of_256_experts(opened):
    """The page gets the JSON of a large cluster."""
    page = opened(390, refused=True)
    big = large_cluster(steps=40)
    page.route("**/cluster?*", lambda r: r.fulfill(json=big))
    page.evaluate("location.hash = '#cluster'")
    until(page, "document.querySelectorAll('.node').length === 8")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('#view-cluster').scrollWidth") <= 390
    took_ms = page.evaluate(
        """async () => {
          const began = performance.now();
          dispatchEvent(new Event("hashchange"));
          for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
          return performance.now() - began;
        }"""
    )
    assert took_ms < 1000 * DEADLINE_S
    assert "Prefix cache\n50 %" in page.inner_text(".figures")
    # Hours, single values, a table, faults, and how a machine is added.
    page.click("[data-span=hours]")
    page.focus(".card-history .plot >> nth=0")
    page.keyboard.press("ArrowLeft")
    until(page, "document.querySelector('.chart .tip').innerText === 'now\\n25 tokens/s'")
    page.keyboard.press("ArrowLeft")
    until(page, "document.querySelector('.chart .tip').innerText === '60 s ago\\n10 tokens/s'")
    page.click("text=As a table")
    rows = "[...document.querySelectorAll('.card-history tbody tr')].map((r) => r.innerText)"
    until(page, f"{rows}.length === 25")
    assert page.evaluate(rows)[0].split("\t") == ["now", "25", "2", "0", "1.0 MB", "800 GB"]
    node = page.inner_text(".node >> nth=0").split("\n")
    for pair in ("Disk free/750 GB", "Sent/3.0 GB", "Link/0.12 ms", "Rate/1.1 GB/s"):
        assert pair.split("/", 1)[1] == node[node.index(pair.split("/")[0]) + 1], node
    faults = page.locator(".faults li").all_inner_texts()
    assert "rank 3 was killed" in faults[0]
    assert "recovering" in faults[0]
    assert "recovered after 4.1 s" in faults[1]
    keys = page.locator(".card-usage tbody th").all_inner_texts()
    assert keys == ["<b>me</b> (yours)", "another key", "without a key", "40 other keys"]
    left, width, bar = page.evaluate(
        """() => {
          const band = document.querySelector(".band");
          return [band.offsetLeft, band.offsetWidth, band.parentElement.offsetWidth];
        }"""
    )
    assert abs(left / bar - 13.6 / 20) < 0.02
    assert abs(width / bar - 4.8 / 20) < 0.02
    assert "between 13.6 and 18.4 ms" in page.inner_text(".card-timings")
    assert "1.09 times as long as the band's end" in page.inner_text(".card-timings")
    page.click("text=Add a machine")
    assert "cenacle join ADDRESS:4747" in page.inner_text(".card-nodes")
    assert page.evaluate("document.querySelector('#view-cluster').scrollWidth") <= 390
    # A node is lost.
    big |= {"status": "failed", "reason": "rank 3 was killed by SIGKILL", "rank": 3}
    page.wait_for_selector(".node.lost")
    assert "rank 3 was killed" in page.inner_text("#banner")
    assert page.inner_text(".node.lost .state") == "lost"
    # The others wait for a machine.
    big |= {"status": "recovering", "detail": "it does not fit: waiting for node 3"}
    until(page, "document.querySelector('#banner').innerText.includes('waiting for node 3')")
    # The server goes away: the last state stays, dimmed.
    page.unroute("**/cluster?*")
    page.route("**/cluster?*", lambda r: r.abort())
    until(page, "document.querySelector('#banner').innerText.includes('Cannot reach')")
    assert len(page.query_selector_all(".node")) == 8


def large_cluster(steps):
    layers, experts, nodes, top_k = 60, 256, 8, 8
    counts = [[(layer * expert) % 7 for expert in range(experts)] for layer in range(layers)]
    runs = [[node, experts // nodes] for node in range(nodes)]
    timings = dict.fromkeys(("trunk", "experts", "all_reduce", "waiting", "rest"), 4.0)
    timings["total"] = 20.0
    return {
        "model": "DeepSeek-V3-0324-4bit",
        "family": "deepseek_v3",
        "status": "ok",
        "uptime_s": 5000,
        "nodes": nodes,
        "recoveries": 0,
        "plan": {
            "placement": "whole", "trunk": "replicated", "reason": "", "all_reduces": layers,
            "backend": "mesh", "top_k": top_k, "total_bytes": int(3.8e11),
        },
        "ranks": [
            {
                "rank": r, "pid": 100 + r, "device": "Device(gpu, 0)", "silent_s": 0.4,
                "weights_bytes": int(5e10), "memory": {
                    "resident_bytes": int(5.2e10),
                    "total_bytes": int(5.5e11),
                    "available_bytes": int(1e11),
                },
                "disk": {"total_bytes": int(2e12), "free_bytes": int(7.5e11) - r},
                "link": {"latency_s": 1.2e-4, "bytes_per_s": 1.1e9, "sent_bytes": int(3e9)},
            }
            for r in range(nodes)
        ],
        "running": 3,
        "waiting": 1,
        "totals": {
            "requests": 900,
            "prompt_tokens": 123456,
            "cached_tokens": 61728,
            "generated_tokens": 4567890,
        },
        "step_timings": {"steps": steps, "mean_ms": timings, "rank_ms": [timings] * nodes},
        "history": {
            "interval_s": 2.0, "tokens_per_s": [40.0] * 150, "running": [3] * 150,
            "waiting": [1] * 150, "sent_bytes_per_s": [2e6] * 150,
            "disk_free_bytes": [None, *[int(7.5e11)] * 149],
        },
        "timeline": {
            "version": 3, "interval_s": 60.0, "until": 1.7e9, "tokens_per_s": [10.0] * 99 + [25.0],
            "running": [2] * 100, "waiting": [0] * 100, "sent_bytes_per_s": [1e6] * 100,
            "disk_free_bytes": [int(8e11)] * 100, "faults": [
                {
                    "began_at": 1.7e9, "ended_at": 1.7e9 + 4.1, "reason": "rank 1 was killed",
                    "rank": 1, "is_final": False,
                },
                {
                    "began_at": 1.7e9 + 99, "ended_at": None, "reason": "rank 3 was killed",
                    "rank": 3, "is_final": False,
                },
            ],
        },
        "prediction": {
            "step_timings_ms": {**timings, "waiting": 0, "total": 16.0}, "tok_per_s": 62.5,
            "band_ms": [13.6, 18.4], "basis": "some",
        },
        "usage": [
            {
                "name": name, "keys": keys, "requests": 1, "prompt_tokens": 1234,
                "generated_tokens": 5000 * keys,
            }
            for name, keys in (("<b>me</b>", 1), (None, 1), ("", 1), (None, 40))
        ],
        "placement": {
            "id": "x", "rank_sets": [[n] for n in range(nodes)], "patterns": [runs],
            "layers": [[n + 3, 0] for n in range(layers)],
        },
        "routing": {"steps": steps, "counts": counts},
    }  # fmt: skip


TRANSFER = """([event, kind, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: kind }));
  const options = { bubbles: true, cancelable: true };
  const made = event === "paste"
    ? new ClipboardEvent(event, { ...options, clipboardData: transfer })
    : new DragEvent(event, { ...options, dataTransfer: transfer });
  document.querySelector("#input").dispatchEvent(made);
}"""


def picture(kind, width, height, color):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (width, height), color).save(file, kind)
    return file.getvalue()


def attached(page, count):
    until(page, "n => document.querySelectorAll('#attached li').length === n", count)


def test_pictures_are_pasted_dropped_chosen_and_sent(opened):
    """The server is played where a model that sees is needed."""
    page = opened()
    small = picture("PNG", 30, 20, "red")
    pasted = ["paste", "image/png", "a.png", base64.b64encode(small).decode()]
    assert page.get_attribute("#attach", "title") == "Add text files or PDF"
    page.evaluate(TRANSFER, pasted)
    until(page, "document.querySelector('#toast').innerText.includes('cannot be shown pictures')")
    bodies = []

    def answer(route):
        bodies.append(route.request.post_data_json)
        delta = {"choices": [{"delta": {"content": "Red."}, "finish_reason": "stop"}]}
        text = f"data: {json.dumps(delta)}\n\ndata: [DONE]\n\n"
        route.fulfill(body=text, headers={"content-type": "text/event-stream"})

    modes = {"input_modalities": ["text", "image"]}
    page.route(
        "**/v1/models", lambda r: r.fulfill(json={"data": [{"id": "seer", "architecture": modes}]})
    )
    page.route("**/v1/chat/completions", answer)
    page.reload()
    page.wait_for_selector("#attach[title*=pictures]")
    page.evaluate(TRANSFER, pasted)
    attached(page, 1)
    large = base64.b64encode(picture("BMP", 2000, 1000, "blue")).decode()
    page.evaluate(TRANSFER, ["drop", "image/bmp", "b.bmp", large])
    attached(page, 2)
    page.set_input_files(
        "#file", files=[{"name": "c.png", "mimeType": "image/png", "buffer": small}]
    )
    attached(page, 3)
    page.click("[aria-label='Remove picture 3']")
    attached(page, 2)
    page.evaluate(TRANSFER, ["paste", "image/png", "broken.png", "A" * 600_000])
    until(page, "document.querySelector('#toast').innerText.includes('broken.png cannot be read')")
    ask(page, "Which colors?")
    assert answers(page) == ["Red."]
    first, second, text = bodies[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "Which colors?"}
    uris = [part["image_url"]["url"] for part in (first, second)]
    assert base64.b64decode(uris[0].removeprefix("data:image/png;base64,")) == small
    shown = pytest.importorskip("PIL.Image").open(
        io.BytesIO(base64.b64decode(uris[1].removeprefix("data:image/jpeg;base64,")))
    )
    assert shown.size == (1536, 768)
    assert shown.convert("RGB").getpixel((700, 300))[2] > 240
    # They stay with the conversation, can be edited, and are enough as a question.
    page.reload()
    until(page, "document.querySelectorAll('.bubble img').length === 2")
    assert page.evaluate("[...document.querySelectorAll('.bubble img')].every(i => i.naturalWidth)")
    page.wait_for_selector("#attach[title*=pictures]")
    page.click("#input")
    page.keyboard.press("ArrowUp")
    attached(page, 2)
    page.click("[aria-label='Remove picture 2']")
    page.fill("#input", "")
    page.click("#send")
    until(page, "document.querySelectorAll('.bubble img').length === 1")
    assert answers(page) == ["Red."]
    assert bodies[1]["messages"][0]["content"] == [first]
    assert page.inner_text(".pick") == "Picture"


SSE = {"content-type": "text/event-stream"}


def sse(*texts, finish="stop", usage=None, end=True):
    """An answer as the server streams it."""
    chunks = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    chunks += [{"choices": [{"delta": {}, "finish_reason": finish}]}] if end else []
    chunks += [{"choices": [], "usage": usage}] if usage else []
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(lines) + ("data: [DONE]\n\n" if end else "")


def played(page, *bodies):
    """Answers that are played, one after the other; returns the requests' bodies."""
    sent, left = [], list(bodies)

    def respond(route):
        sent.append(route.request.post_data_json)
        route.fulfill(body=left.pop(0), headers=SSE)

    page.route("**/v1/chat/completions", respond)
    return sent


def shows_answer(page, text):
    """Wait for the last answer."""
    until(page, "t => [...document.querySelectorAll('.prose')].at(-1)?.innerText === t", text)
    return answers(page)


def test_any_question_is_edited_and_branches_are_walked(opened):
    page = opened()
    sent = played(page, *(sse(text) for text in ("a1", "b1", "A1", "A2")))
    ask(page, "a")
    assert shows_answer(page, "a1") == ["a1"]
    ask(page, "b")
    assert shows_answer(page, "b1") == ["a1", "b1"]
    page.hover(".user >> nth=0")
    page.click(".user >> nth=0 >> [aria-label=Edit]")
    ask(page, "A")
    assert shows_answer(page, "A1") == ["A1"]
    assert [m["content"] for m in sent[2]["messages"]] == ["A"]
    page.click("[aria-label=Regenerate]")
    assert shows_answer(page, "A2") == ["A2"]
    branches = page.locator(".branches")
    assert branches.all_inner_texts() == ["2/2", "2/2"]
    branches.nth(1).get_by_label("Previous branch").click()
    assert shows_answer(page, "A1") == ["A1"]
    page.hover(".user >> nth=0")
    branches.nth(0).get_by_label("Previous branch").click()
    assert shows_answer(page, "b1") == ["a1", "b1"]
    page.reload()
    assert shows_answer(page, "b1") == ["a1", "b1"]


def test_a_cut_answer_is_continued_also_when_the_server_was_away(opened):
    page = opened()
    page.click("#open-settings")
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_tokens]", "3")
    page.click("#settings .main")
    ask(page, "Spell otter backwards.")
    assert shows_answer(page, "ret") == ["ret"]
    assert page.inner_text(".stats").endswith("reached the token limit")
    page.click(".continue")
    assert shows_answer(page, "retto") == ["retto"]
    # The connection breaks: the page asks by itself for what is missing.
    page.click("#new")
    page.wait_for_selector(".empty")
    sent = played(page, sse("It goes", end=False), sse(" on."))
    ask(page, "And now?")
    assert shows_answer(page, "It goes on.") == ["It goes on."]
    assert "Connected again" in page.inner_text("#toast")
    assert sent[1]["messages"][1] == {"role": "assistant", "content": "It goes"}
    assert sent[1]["continue_final_message"]


def test_settings_prompts_and_models_are_what_is_sent(opened):
    page = opened()
    listed = [{"id": name, "context_length": 1000} for name in ("one", "two")]
    page.route("**/v1/models", lambda r: r.fulfill(json={"data": listed}))
    usage = {"prompt_tokens": 300, "completion_tokens": 995}
    usage |= {"prompt_tokens_details": {"cached_tokens": 200}}
    sent = played(page, sse("x", "x" * 4999, usage=usage), sse("y"))
    page.reload()
    page.wait_for_selector("#choose-model:not([hidden])")
    page.select_option("#choose-model", "two")
    page.click("#open-settings")
    page.fill("#settings [name=system]", "general")
    page.select_option("[name=reasoning_effort]", "low")
    page.click("#settings summary")
    given = {"top_p": 0.9, "min_p": 0.05, "top_k": 40, "seed": 7, "thinking_budget": 99}
    for name, value in given.items():
        page.fill(f"[name={name}]", str(value))
    page.fill("[name=stop]", "END\nSTOP")
    page.fill("[name=schema]", "{")
    page.click("#settings .main")
    refusal = page.evaluate("document.querySelector('[name=schema]').validationMessage")
    assert refusal.startswith("This is not JSON")
    page.fill("[name=schema]", '{"type": "object"}')
    page.click("#settings .main")
    page.click("#open-prompts")
    page.click("#prompts summary")
    page.fill("#prompts [name=name]", "Short")
    page.fill("#prompts [name=text]", "Answer in a word.")
    page.click("#add-template")
    page.click("[aria-label='Use Short as system prompt']")
    page.click("#prompts .main")
    until(page, "document.querySelector('.system')?.innerText.includes('Answer in a word.')")
    page.click("#open-prompts")
    page.click(".insert")
    assert page.input_value("#input") == "Answer in a word."
    ask(page, "a")
    answers(page)
    system = {"role": "system", "content": "Answer in a word."}
    assert sent[0]["messages"] == [system, {"role": "user", "content": "a"}]
    assert {name: sent[0][name] for name in given} == given
    assert (sent[0]["model"], sent[0]["stop"]) == ("two", ["END", "STOP"])
    assert sent[0]["reasoning_effort"] == "low"
    assert sent[0]["response_format"]["json_schema"]["schema"] == {"type": "object"}
    # An answer that came at once has no speed; the context is full.
    assert re.fullmatch(
        r"first token after \S+ m?s · 995 tokens · 200 of 300 prompt tokens cached · two",
        page.inner_text(".stats"),
    )
    assert page.inner_text("#context") == "1,295 of 1,000 tokens of context"
    page.click("#new")
    ask(page, "b")
    assert shows_answer(page, "y") == ["y"]
    assert sent[1]["messages"][0]["content"] == "general"


def test_two_answers_are_beside_each_other_until_one_is_chosen(opened):
    page = opened()
    page.set_viewport_size({"width": 1280, "height": 860})
    sent = played(page, *(sse(text) for text in ("a1", "a2", "a3", "b1", "b2", "c1")))
    ask(page, "a")
    assert shows_answer(page, "a1") == ["a1"]
    page.click("[aria-label='Another answer beside this one']")
    page.fill("#second [name=temperature]", "1.5")
    page.fill("#second [name=system]", "Be odd.")
    page.click("#second .main")
    assert shows_answer(page, "a2") == ["a1", "a2"]
    assert sent[1]["temperature"] == 1.5
    assert "temperature" not in sent[0]
    roles = [[m["role"] for m in body["messages"]] for body in sent]
    assert roles == [["user"], ["system", "user"]]
    places = "[...document.querySelectorAll('.column')].map((e) => e.getBoundingClientRect())"
    left, right = page.evaluate(f"{places}.map((r) => [r.left, r.right, r.top])")
    assert (left[1] < right[0], left[2]) == (True, right[2])
    page.set_viewport_size({"width": 390, "height": 860})
    above, below = page.evaluate(f"{places}.map((r) => [r.top, r.bottom])")
    assert above[1] < below[0]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.reload()
    assert answers(page) == ["a1", "a2"]
    # Another one in the second's place, which goes on.
    page.click(".column:nth-child(2) [aria-label=Regenerate]")
    assert shows_answer(page, "a3") == ["a1", "a3"]
    assert sent[2]["temperature"] == 1.5
    page.click(".column:nth-child(2) .decide")
    until(page, "document.querySelector('.branches')?.innerText === '3/3'")
    assert answers(page) == ["a3"]
    assert page.inner_text(".stats").endswith("temperature 1.5, system: Be odd.")
    # Every question twice; without a choice the first one goes on.
    twice = """async (value) => {
      const store = await import("/static/store.js");
      store.saveSettings({ ...store.settings(), twice: value });
    }"""
    page.evaluate(twice, True)
    ask(page, "b")
    until(page, "document.querySelectorAll('.decide').length === 2")
    assert sorted(answers(page)[1:]) == ["b1", "b2"]
    page.evaluate(twice, False)
    ask(page, "c")
    first = shows_answer(page, "c1")
    assert first == ["a3", sent[5]["messages"][3]["content"], "c1"]
    assert [m["content"] for m in sent[5]["messages"]] == ["a", "a3", "b", first[1], "c"]


TOOLS = """[
  {"name": "weather", "description": "d", "parameters": {"type": "object"}, "result": {"c": 21}},
  {"type": "function", "function": {"name": "ask", "parameters": {"type": "object"}}}
]"""


def sse_calls(*calls):
    """Calls as the server streams them, the arguments of each in two pieces."""
    chunks = []
    for index, (name, arguments) in enumerate(calls):
        first = {"name": name, "arguments": arguments[:5]}
        part = {"index": index, "id": f"c{index}", "type": "function", "function": first}
        rest = {"index": index, "function": {"arguments": arguments[5:]}}
        chunks += [{"choices": [{"delta": {"tool_calls": [d]}}]} for d in (part, rest)]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def test_calls_of_tools_are_cards_and_their_results_are_given(opened):
    page = opened(390)
    hostile = '{"q": "<img src=x onerror=alert(1)>"}'
    sent = played(
        page,
        sse_calls(("weather", '{"place": "Bern"}'), ("ask", hostile)),
        sse_calls(("weather", '{"place": "Basel"}')),
        sse("Warm."),
    )
    page.click("#open-settings")
    page.click("#tool-bench summary")
    page.fill("[name=tools]", '{"name": "x"}')
    page.click("#settings .main")
    refusal = page.evaluate("document.querySelector('[name=tools]').validationMessage")
    assert refusal.startswith("Tools are a JSON list")
    page.click("#example-tools")
    assert json.loads(page.input_value("[name=tools]"))[0]["name"] == "weather"
    page.fill("[name=tools]", TOOLS)
    page.click("#settings .main")
    ask(page, "Warm?")
    until(page, "document.querySelectorAll('.call').length === 2")
    # One result is the settings' own, the other one is typed; a reload keeps the calls.
    page.wait_for_selector(".give button")
    stored(page)
    page.reload()
    page.wait_for_selector(".give button")
    cards = page.locator(".call").all_inner_texts()
    assert '{"c":21}' in cards[0]
    assert "<img src=x" in cards[1]
    assert page.locator(".call img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.fill("[aria-label='Result of ask']", "yes")
    page.click(".give button")
    # The next call has its result from the settings: the model goes on at once.
    assert shows_answer(page, "Warm.")[-1] == "Warm."
    assert [tool["function"]["name"] for tool in sent[0]["tools"]] == ["weather", "ask"]
    assert "result" not in json.dumps(sent[0]["tools"])
    calls, *results = sent[1]["messages"][1:]
    assert [c["function"]["arguments"] for c in calls["tool_calls"]] == [
        '{"place": "Bern"}',
        hostile,
    ]
    assert results == [
        {"role": "tool", "tool_call_id": "c0", "content": '{"c":21}'},
        {"role": "tool", "tool_call_id": "c1", "content": "yes"},
    ]
    assert [m["role"] for m in sent[2]["messages"]] == [
        "user", "assistant", "tool", "tool", "assistant", "tool",
    ]  # fmt: skip
    page.reload()
    assert shows_answer(page, "Warm.")[-1] == "Warm."
    assert page.locator(".call").count() == 3


def file(name, kind, data):
    return {"name": name, "mimeType": kind, "buffer": data}


def test_text_files_are_counted_and_sent(opened):
    page = opened()
    sent = played(page, sse("x"))
    bad = file("b.bin", "", b"\xff\x00")
    page.set_input_files("#file", files=[file("a.csv", "text/csv", b"a,b\n```\n"), bad])
    until(page, "/[1-9]\\d* tokens/.test(document.querySelector('#attached').innerText)")
    assert "b.bin is not a text file" in page.inner_text("#toast")
    page.set_input_files("#file", files=[file("c.docx", "", b"PK")])
    until(page, "document.querySelector('#toast').innerText.includes('only text and PDF are read')")
    ask(page, "Which?")
    assert shows_answer(page, "x") == ["x"]
    text = "File a.csv:\n\n````csv\na,b\n```\n````\n\nWhich?"
    assert sent[0]["messages"] == [{"role": "user", "content": text}]
    assert re.match(r"a\.csv\s+\d+ tokens\s+Which\?", page.inner_text(".bubble"))


def make_pdf(*pages):
    """A PDF with a line of text on each page (none where it is empty)."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(pages)))
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
    ]
    for number, text in enumerate(pages):
        drawing = f"BT /F1 12 Tf 50 700 Td ({text}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {4 + 2 * number} 0 R "
            f"/Resources << /Font << /F1 {font} >> >> >>",
            f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream",
        ]
    data, places = "%PDF-1.4\n", []
    for number, text in enumerate(objects):
        places.append(len(data))
        data += f"{number + 1} 0 obj\n{text}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF"
    return f"{data}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def test_the_text_of_a_pdf_is_read_and_nothing_loaded_before(opened):
    page = opened()
    sent = played(page, sse("x"))
    scripts = "performance.getEntriesByType('resource').filter(r => r.name.includes('pdf'))"
    assert page.evaluate(f"{scripts}.length") == 0
    for name, data, reason in (
        ("bad.pdf", b"%PDF-1.4 nothing", "bad.pdf is not a PDF that can be read"),
        ("scan.pdf", make_pdf(""), "scan.pdf has no text, only pictures of pages"),
    ):
        page.set_input_files("#file", files=[file(name, "application/pdf", data)])
        until(page, "t => document.querySelector('#toast').innerText === t", reason)
    two = make_pdf("First page", "<b>Second</b> page")
    page.set_input_files("#file", files=[file("a.pdf", "application/pdf", two)])
    until(page, "/[1-9]\\d* tokens/.test(document.querySelector('#attached').innerText)")
    ask(page, "Which?")
    shows_answer(page, "x")
    wanted = "File a.pdf:\n\n```pdf\nFirst page\n\n<b>Second</b> page\n```\n\nWhich?"
    assert sent[0]["messages"] == [{"role": "user", "content": wanted}]


def conversation(number, text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"A {number}"}]
    at = 1_700_000_000_000 + number
    return {"id": f"{number:016x}", "title": "", "updatedAt": at, "messages": messages}


def test_many_conversations_are_searched_and_exported(opened):
    page = opened()
    old = conversation(5000, "From an earlier version")
    page.evaluate(
        "([id, text]) => localStorage.setItem(`cenacle.conversation.${id}`, text)",
        [old["id"], json.dumps(old)],
    )
    page.reload()
    until(page, "document.querySelector('.pick')?.innerText === 'From an earlier version'")
    assert page.evaluate("Object.keys(localStorage).every(k => !k.includes('conversation'))")
    many = [conversation(n, f"Question {n} {'words ' * 20}") for n in range(800)]
    many[700]["messages"][1]["content"] = "a needle <b>in</b> the hay"
    data = json.dumps(many).encode()
    page.set_input_files("#import-file", files=[file("m.json", "application/json", data)])
    until(page, "document.querySelector('#toast').innerText.startsWith('800 conversations')")
    assert page.evaluate("document.querySelectorAll('#conversations li').length") == 100
    page.fill("#search", "a NEEDLE")
    until(page, "document.querySelector('#search-result').textContent === '1 found'")
    until(page, "document.querySelectorAll('.pick').length === 1")
    assert "a needle <b>in</b> the hay" in page.inner_text(".pick")
    page.click(".pick")
    shows_answer(page, "a needle <b>in</b> the hay")
    page.locator("#conversations .icon").first.click()
    page.get_by_role("menuitem", name="Pin").click()
    page.fill("#search", "")
    until(page, "document.querySelectorAll('#conversations li').length === 100")
    until(page, "document.querySelector('.pick').innerText.startsWith('Question 700')")
    stored(page)
    # Another window changes it, and one that did not see that yet: what both wrote is kept.
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector(".pick")
    other.click(".pick >> nth=0")
    shows_answer(other, "a needle <b>in</b> the hay")
    played(other, sse("answer two"))
    late = """async (id) => {
      const store = await import("/static/store.js");
      const tree = await import("/static/tree.js");
      if (!window.kept) window.kept = await store.load(id);
      else {
        tree.add(kept, { role: "user", content: "one" }, tree.path(kept).at(-1));
        await store.save(kept);
      }
    }"""
    page.evaluate(late, many[700]["id"])
    ask(other, "two")
    shows_answer(other, "answer two")
    shows_answer(page, "answer two")
    page.evaluate(late, many[700]["id"])
    with page.expect_download() as given:
        page.click("#export-all")
    exported = json.loads(Path(given.value.path()).read_text())
    assert len(exported) == 801
    (found,) = [c for c in exported if c["id"] == many[700]["id"]]
    kept = {m["content"] for m in found["messages"]}
    assert kept >= {"one", "two", "answer two"}
    assert found["pinned"]


def test_an_exported_conversation_is_read_again(opened):
    page = opened()
    text = b"# T\n\n**System**\n\ns\n\n---\n\n**You**\n\na\n\n---\n\n**Model**\n\nb\n"
    page.set_input_files("#import-file", files=[file("a.md", "text/markdown", text)])
    until(page, "document.querySelector('.pick')?.innerText === 'T'")
    page.locator("#conversations .icon").first.click()
    with page.expect_download() as given:
        page.get_by_role("menuitem", name="Export as Markdown").click()
    assert Path(given.value.path()).read_bytes() == text
    image = {"role": "user", "content": "ok", "images": ["http://127.0.0.1:9/c.png"]}
    hostile = [{"id": 1}, {**conversation(1, "a"), "messages": "no"}]
    hostile += [{**conversation(2, "ok"), "leaf": {}, "messages": [None, image]}]
    data = json.dumps(hostile).encode()
    page.set_input_files("#import-file", files=[file("h.json", "application/json", data)])
    until(page, "document.querySelectorAll('.pick').length === 2")
    page.get_by_text("ok", exact=True).click()
    until(page, "document.querySelector('.bubble')?.innerText === 'ok'")
    assert not page.query_selector(".bubble img")


OLD_DATABASE = """async (conversations) => {
  const request = indexedDB.open("cenacle", 1);
  request.onupgradeneeded = () => {
    for (const name of ["conversations", "heads"]) request.result.createObjectStore(name, { keyPath: "id" });
  };
  await new Promise((resolve) => { request.onsuccess = resolve; });
  const transaction = request.result.transaction(["conversations", "heads"], "readwrite");
  for (const c of conversations) {
    transaction.objectStore("conversations").put(c);
    transaction.objectStore("heads").put({ id: c.id, title: `Old ${c.id}`, updatedAt: c.updatedAt, pinned: false });
  }
  await new Promise((resolve) => { transaction.oncomplete = resolve; });
  request.result.close();
}"""  # noqa: E501


def test_tags_filter_the_list_and_stay_with_old_and_exported_conversations(opened, url):
    page = opened(390, refused=True)  # a favicon, for the first address
    page.goto(f"{url}/static/icon.svg")
    page.evaluate(OLD_DATABASE, [conversation(n, f"Question {n}") for n in range(3)])
    page.goto(url)
    page.click("#open-list")
    until(page, "document.querySelectorAll('.pick').length === 3")

    def tag(title, text):
        page.get_by_label(f"Options for {title}").click()
        page.get_by_role("menuitem", name="Tags").click()
        page.fill(".rename", text)
        page.keyboard.press("Enter")
        stored(page)

    tag(f"Old {2:016x}", " work,  Work ,<b>x</b>, ")
    until(page, "document.querySelector('#tags')?.innerText.includes('work')")
    assert page.locator("#tags button").all_inner_texts() == ["<b>x</b>1", "work1"]
    tag(f"Old {0:016x}", "work")
    page.click("#tags [data-tag=work]")
    until(page, "document.querySelectorAll('.pick').length === 2")
    # With a search; a new conversation is among those of the tag.
    page.fill("#search", "question 2")
    until(page, "document.querySelectorAll('.pick').length === 1")
    page.fill("#search", "")
    until(page, "document.querySelectorAll('.pick').length === 2")
    played(page, sse("x"))
    page.click("#new")
    ask(page, "New")
    shows_answer(page, "x")
    page.reload()
    page.click("#open-list")
    until(page, "document.querySelectorAll('#tags button').length === 2")
    assert page.locator("#tags button").all_inner_texts() == ["<b>x</b>1", "work3"]
    page.get_by_label("Options for Question 2").click()
    with page.expect_download() as given:
        page.get_by_role("menuitem", name="Export as Markdown").click()
    text = Path(given.value.path()).read_text()
    assert text.startswith("# Question 2\n\nTags: <b>x</b>, work\n\n**You**")
    page.get_by_label("Options for Question 2").click()
    with page.expect_download() as given:
        page.get_by_role("menuitem", name="Export as JSON").click()
    value = json.loads(Path(given.value.path()).read_text())
    assert value["tags"] == ["<b>x</b>", "work"]
    again = [file("a.md", "text/markdown", text.encode())]
    value |= {"id": "other", "tags": ["work", 7, "y" * 99]}
    again.append(file("a.json", "application/json", json.dumps(value).encode()))
    page.set_input_files("#import-file", files=again)
    wanted = ["<b>x</b>2", "work5", "y" * 30 + "1"]
    shown = "[...document.querySelectorAll('#tags button')].map((e) => e.innerText).join()"
    until(page, f"w => {shown} === w", ",".join(wanted))


def test_answers_and_conversations_are_shared_where_the_system_can(opened):
    page = opened()
    assert not page.query_selector("[aria-label=Share]")
    page.add_init_script("navigator.share = async (what) => { window.shared = what; }")
    page.reload()
    ask(page, "What is 12 + 30?")
    assert answers(page) == ["42"]
    page.click("[aria-label=Share]")
    until(page, "window.shared?.text === '42'")
    page.locator("#conversations .icon").click()
    page.get_by_role("menuitem", name="Share").click()
    until(page, "window.shared.title === 'What is 12 + 30?'")
    assert page.evaluate("window.shared.text").startswith("# What is 12 + 30?")
    assert page.evaluate(
        "[...document.querySelectorAll('article h2')].map((h) => h.innerText)"
    ) == [
        "You",
        "Model",
    ]


def test_keys_work_and_are_listed(opened):
    page = opened(390)
    page.keyboard.press("?")
    assert "new conversation" in page.inner_text("#keys")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Control+Shift+o")
    page.keyboard.press("Control+Comma")
    assert page.is_visible("#settings")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+y")
    assert page.is_visible("#prompts")


def test_only_files_of_the_page_are_served(url):
    with httpx.Client(base_url=url) as client:
        for path, kind in {
            "/": "text/html", "/static/app.js": "text/javascript", "/static/style.css": "text/css",
            "/static/icon.svg": "image/svg+xml",
            "/static/page.webmanifest": "application/manifest+json",
            "/static/katex/fonts/KaTeX_Main-Regular.woff2": "font/woff2",
            "/static/pdfjs/pdf.worker.min.mjs": "text/javascript; charset=utf-8",
            "/static/mermaid/frame.html": "text/html",
        }.items():  # fmt: skip
            answer = client.get(path)
            assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")
            assert answer.headers["content-type"].startswith(kind)
            again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        html = client.get("/").text
        assert not re.search(r"<script>|style=|\son\w+=|https?://", html)
        for path in (
            "/static/..%2fapp.py", "/static/../app.py", "/static/%2e%2e/app.py", "/static/",
            "/static//etc/passwd", "/static/..%5capp.py", "/static/app.js/", "/static/app.js%00",
        ):  # fmt: skip
            assert client.get(path).status_code == 404, path
        full = client.get("/cluster").json()
        known = {"placement": full["placement"]["id"], "steps": full["step_timings"]["steps"]}
        known["timeline"] = full["timeline"]["version"]
        reduced = client.get("/cluster", params=known).json()
        assert set(full) - set(reduced) == {"placement", "routing", "timeline"}
