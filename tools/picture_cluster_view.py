"""Take the README's picture of the cluster view.

One client after the other asks a running server, until enough steps are measured: what is predicted
is one request alone. On a quiet machine, calibrated with `cenacle calibrate`:

    cenacle synth --name moe-2b --quantize 4 --out DIR
    cenacle serve -m DIR -n 2 --placement whole --speculative off --measure-every 2
    python tools/picture_cluster_view.py http://127.0.0.1:8080

It prints the measured time of a token beside the predicted one.
"""

import argparse
import itertools
import shutil
import sys
import threading
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright

WIDTH, MARGIN = 1200, 20  # pixels
WORDS = ("red", "otter", "sum", "river", "seven", "glass", "north", "spell")


def name_model(client: httpx.Client) -> str:
    """The first served model."""
    return str(client.get("/v1/models").json()["data"][0]["id"])


def ask(client: httpx.Client, model: str, number: int, max_tokens: int = 128) -> None:
    """Have a model answer a prompt that begins in its own way."""
    prompt = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(16))
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 1}
    client.post("/v1/completions", json=body).raise_for_status()


def measure_steps(url: str, steps: int) -> dict[str, float]:
    """Ask until so many steps are measured; returns the measured and predicted times, in ms."""
    with httpx.Client(base_url=url, timeout=600) as client:
        name = name_model(client)
        for number in itertools.count():
            view = client.get("/cluster").json()
            timings, prediction = view["step_timings"], view["prediction"]
            if timings["steps"] >= steps:
                break
            ask(client, name, number)
    predicted = prediction["step_timings_ms"]["total"] if prediction else float("nan")
    return {"measured": timings["mean_ms"]["total"], "predicted": predicted}


def take_picture(url: str, out: Path) -> None:
    """A screenshot down to the times of a token, while a request runs."""
    with sync_playwright() as playwright, httpx.Client(base_url=url, timeout=600) as client:
        running = threading.Thread(target=ask, args=(client, name_model(client), 0, 400))
        running.start()
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 1700}, color_scheme="light")
        page.goto(f"{url}/#cluster")
        page.wait_for_selector(".card-timings .bar")
        page.wait_for_timeout(4000)  # two samples of the history
        box = page.locator(".card-timings").bounding_box()
        assert box is not None
        height = box["y"] + box["height"] + MARGIN
        page.screenshot(path=out, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        browser.close()
        running.join()


def main() -> int:
    """Parse the arguments and run; 1 if prediction and measurement differ by over 15 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of a running server")
    parser.add_argument("--steps", type=int, default=1000, help="measured ones before the picture")
    parser.add_argument("--out", type=Path, default=Path("docs/cluster-view.png"))
    arguments = parser.parse_args()
    times = measure_steps(arguments.url, arguments.steps)
    take_picture(arguments.url, arguments.out)
    difference = times["measured"] / times["predicted"] - 1
    print(f"{times['measured']:.2f} ms, predicted {times['predicted']:.2f}: {difference:+.0%}")
    return int(not abs(difference) <= 0.15)


if __name__ == "__main__":
    sys.exit(main())
