"""Check the web page of a running server by hand: accessibility, screenshots, a day's use.

axe-core goes through the views and dialogs at three widths, light and dark; screenshots of each are
written. Then 500 conversations, one of 200 messages, an answer of 100 kB that is cut off once as by
a server that restarts, and a second window, with times and memory. The server answers a few
questions for the cluster view; the page's own requests for answers are played.
"""

import argparse
import itertools
import json
import shutil
import sys
from pathlib import Path

import httpx
from playwright.sync_api import Browser, FilePayload, Page, sync_playwright

ANSWER = r"""## Euler's identity

Inline $e^{i\pi} + 1 = 0$, costs $5 and $10, and a note[^1].

\[ \int_{-\infty}^{\infty} e^{-x^2}\,dx = \sqrt{\pi} \]

```python
class Point(Base):  # a comment
    x: float = 3.5e-2
```

- [x] done
- [ ] open

| Model | Parameters | Active | Context |
|---|--:|--:|:-:|
| Qwen3-235B-A22B-Instruct | 235 B | 22 B | 262144 |

هذا نص عربي من اليمين إلى اليسار.

[^1]: The note.
"""
# Streams a text in pieces of twenty characters, at most 200 pieces a second, or what is left of it
# where an answer is continued. The connection breaks once at `window.breakAt`, where that is set. A
# question with tools gets a call of the first.
PLAY = """(text) => {
  const real = window.fetch;
  const event = (value) => `data: ${JSON.stringify(value)}\\n\\n`;
  window.fetch = (url, options) => {
    if (!String(url).includes("chat/completions")) return real(url, options);
    const encoder = new TextEncoder();
    const body = JSON.parse(options.body);
    if (body.tools && body.messages.at(-1).role === "user") {
      const call = { index: 0, id: "call_1", type: "function", function: { name: body.tools[0].function.name, arguments: '{"city": "Oslo"}' } };
      const choice = { delta: { tool_calls: [call] }, finish_reason: "tool_calls" };
      const text = event({ choices: [choice] }) + "data: [DONE]\\n\\n";
      return Promise.resolve(new Response(text, { headers: { "content-type": "text/event-stream" } }));
    }
    let at = body.continue_final_message ? body.messages.at(-1).content.length : 0;
    const stream = new ReadableStream({ async pull(controller) {
      await new Promise((resolve) => setTimeout(resolve, 5));
      if (window.breakAt && at > window.breakAt) {
        window.breakAt = 0;
        controller.error(new TypeError("the connection was lost"));
        return;
      }
      const ends = at >= text.length;
      const choice = ends ? { delta: {}, finish_reason: "length" } : { delta: { content: text.slice(at, at += 20) } };
      const usage = { prompt_tokens: 300, completion_tokens: 200 };
      controller.enqueue(encoder.encode(event({ choices: [choice] }) + (ends ? event({ choices: [], usage }) + "data: [DONE]\\n\\n" : "")));
      if (ends) controller.close();
    } });
    return Promise.resolve(new Response(stream, { headers: { "content-type": "text/event-stream" } }));
  };
}"""  # noqa: E501
FINDINGS = """async () => (await axe.run(document)).violations.map(
  (v) => `${v.impact} ${v.id}: ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 90)).join(" ")}`)"""


UNFOLD = "for (const more of document.querySelectorAll('details')) more.open = true"
NARROW = 760  # pixels, below which the list is drawn over the chat


def open_page(browser: Browser, url: str, width: int, scheme: str) -> Page:
    """A page with a conversation, a system prompt and an attached file."""
    page = browser.new_context(
        viewport={"width": width, "height": 860},
        color_scheme="dark" if scheme == "dark" else "light",
    ).new_page()
    page.on("pageerror", lambda error: print("ERROR", error))
    page.on("console", lambda message: print("CONSOLE", message.text))
    page.goto(url)
    page.wait_for_selector("#messages > *")
    return page


def until(page: Page, condition: str) -> None:
    """Wait for a condition; the page's policy forbids the `eval` of Playwright's own wait."""
    while not page.evaluate(condition):
        page.wait_for_timeout(50)


def ask(page: Page, text: str) -> None:
    """Ask, and wait for the end of the answer."""
    page.fill("#input", text)
    page.click("#send")
    page.wait_for_timeout(500)
    while page.locator(".streaming").count():  # a handle would keep the element in memory
        page.wait_for_timeout(100)


def check_views(browser: Browser, url: str, axe: str, folder: Path) -> int:
    """Screenshots and findings of each view and dialog; the number of serious findings."""
    serious = 0
    for width, scheme in itertools.product((390, 768, 1280), ("light", "dark")):
        page = open_page(browser, url, width, scheme)
        page.evaluate(PLAY, ANSWER)
        for question in ("Explain Euler's identity", "Once more, please"):
            ask(page, question)

        def look(name: str, page: Page = page, at: str = f"{width}-{scheme}") -> int:
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"{at}-{name}.png")
            page.evaluate(axe + "; 0")
            found = page.evaluate(FINDINGS)
            for line in found:
                print(f"{at} {name}: {line}")
            return sum(line.startswith(("serious", "critical")) for line in found)

        serious += look("chat")
        for opener in ("#open-settings", "#open-prompts"):
            page.click(opener)
            page.evaluate(UNFOLD)
            serious += look(opener.removeprefix("#open-"))
            page.keyboard.press("Escape")
        for name in ("key", "keys"):
            page.evaluate(f"document.querySelector('#{name}').showModal()")
            serious += look(name)
            page.keyboard.press("Escape")
        page.keyboard.press("Control+k")
        serious += look("list")
        page.locator("#conversations .icon").first.click()
        serious += look("menu")
        page.get_by_role("menuitem", name="Tags").click()
        page.fill(".rename", "work, a rather long tag of several words")
        serious += look("tagging")
        page.keyboard.press("Enter")
        page.wait_for_selector("#tags button")
        serious += look("tags")
        page.keyboard.press("Escape")
        if width < NARROW:
            page.mouse.click(width - 10, 500)  # beside the list
        page.locator("[aria-label='Another answer beside this one']").click()
        serious += look("second")
        page.click("#second .main")
        page.wait_for_timeout(500)
        while page.locator(".streaming").count():
            page.wait_for_timeout(100)
        serious += look("beside")
        page.locator(".column-head button").first.click()
        page.click("#open-settings")
        page.evaluate(UNFOLD)
        page.click("#example-tools")
        serious += look("bench")
        page.click("#settings .main")
        ask(page, "What is the weather in Oslo?")
        page.locator(".call").last.scroll_into_view_if_needed()
        serious += look("call")
        page.evaluate("location.hash = '#cluster'")
        page.wait_for_timeout(1000)
        page.evaluate(UNFOLD)
        height = page.evaluate("document.querySelector('#view-cluster').scrollHeight") + 60
        page.set_viewport_size({"width": width, "height": min(height, 4000)})
        page.wait_for_timeout(1000)
        serious += look("cluster")
        page.context.close()
    return serious


def use_a_day(browser: Browser, url: str) -> None:
    """Print times and memory with many conversations, a long one and a long answer."""
    page = open_page(browser, url, 1280, "light")
    debugger = page.context.new_cdp_session(page)

    def heap_mb() -> str:
        debugger.send("HeapProfiler.collectGarbage")
        return f"{debugger.send('Runtime.getHeapUsage')['usedSize'] / 1e6:.1f} MB of script memory"

    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    scripts = "performance.getEntriesByType('resource').filter(r => r.name.endsWith('.js'))"
    size = page.evaluate(f"{scripts}.reduce((sum, r) => sum + r.decodedBodySize, 0)")
    print(f"first paint {page.evaluate(paint):.0f} ms, script {size / 1000:.0f} kB, {heap_mb()}")

    def conversation(name: str, count: int, text: str) -> dict[str, object]:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": f"{i}: {text}"} for i in range(count)]
        return {"id": name, "title": name, "updatedAt": 1, "messages": messages}

    many = [conversation(f"Number {n}", 10, "word " * 60) for n in range(500)]
    many.append({**conversation("Long", 200, ANSWER), "pinned": True})
    data = json.dumps(many).encode()
    payload = FilePayload(name="a.json", mimeType="application/json", buffer=data)
    page.set_input_files("#import-file", files=[payload])
    page.wait_for_selector("text=501 conversations imported")
    took = page.evaluate(
        """async () => {
          const began = performance.now();
          document.querySelector(".pick").click();
          while (document.querySelectorAll(".message").length < 200) await new Promise(requestAnimationFrame);
          return performance.now() - began;
        }"""  # noqa: E501
    )
    print(f"200 messages open after {took:.0f} ms, {heap_mb()}")
    other = page.context.new_page()  # a second window, with the same conversation
    other.goto(url)
    other.wait_for_selector(".pick")
    other.click(".pick")
    until(other, "document.querySelectorAll('.message').length === 200")
    page.evaluate(PLAY, ANSWER)
    ask(page, "One more")
    until(other, "document.querySelectorAll('.message').length === 202")
    other.close()
    print("a second window shows what the first asked")
    page.click("#new")
    long_answer = (ANSWER + "\n") * 170
    page.evaluate(PLAY, long_answer)
    page.evaluate("window.breakAt = 50_000")
    debugger.send("Performance.enable", {"timeDomain": "threadTicks"})
    ask(page, "A long answer")
    page.wait_for_selector("text=reached the token limit", timeout=600_000)
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.locator(".assistant .foot [aria-label=Copy]").click()
    until(page, "window.copied !== undefined")
    assert page.evaluate("window.copied") == long_answer, (
        "the answer is another after a lost connection"
    )
    print("an answer of 100 kB is whole after a lost connection")
    metrics = {m["name"]: m["value"] for m in debugger.send("Performance.getMetrics")["metrics"]}
    busy = ", ".join(f"{k[:-8]} {metrics[k]:.1f} s" for k in ("ScriptDuration", "LayoutDuration"))
    print(f"{page.inner_text('.stats')}; {busy}; {heap_mb()}")
    page.click("#new")
    page.wait_for_timeout(1000)
    print(f"afterwards {heap_mb()}")
    page.reload()
    page.wait_for_selector(".pick")
    count = """async () => {
      const { heads } = await import("/static/store.js");
      return heads().length;
    }"""
    assert page.evaluate(count) == 502, "conversations were lost"
    print("502 conversations are there after a reload")


def fill_cluster_view(url: str) -> None:
    """Have the server answer, so that there is something to see; it may refuse."""
    for number in range(6):
        body = {"messages": [{"role": "user", "content": f"What is {number} + 30?"}]}
        httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 64}, timeout=600)


def main() -> int:
    """Parse the arguments and run; 1 if axe found something serious."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of a running server, with any model")
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js")
    parser.add_argument("--out", type=Path, default=Path("build/page"), help="for screenshots")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        fill_cluster_view(arguments.url)
        serious = check_views(browser, arguments.url, arguments.axe.read_text(), arguments.out)
        use_a_day(browser, arguments.url)
        browser.close()
    print(f"{serious} serious findings; screenshots are in {arguments.out}")
    return int(serious > 0)


if __name__ == "__main__":
    sys.exit(main())
