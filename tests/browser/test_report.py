"""The report on a phone and on a screen, in a real browser."""

import shutil

import pytest

from cenacle.planning import catalog, planner, report
from cenacle.planning.perf_model import Workload

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page_file(tmp_path):
    known = catalog.load_catalog()
    machines, link, constants = planner.resolve_cluster(known, "2xm2-ultra-192", "10gbe-grpc", None)
    workload = Workload(known.model("dbrx"), catalog.parse_quantization(16))
    result = planner.evaluate_options(workload, machines, link, constants)
    curve = planner.what_if_curve("nodes=1..4", workload, machines, link, constants)
    file = tmp_path / "report.html"
    file.write_text(report.render_html(result, [curve]))
    return file


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_is_read_without_scrolling_sideways(page_file, width):
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: the report was not looked at; install Debian's chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="NO PLAYWRIGHT: pip install it")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844})
        asked, said = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("console", lambda m: said.append(m.text))
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert asked == [page_file.as_uri()], "the report asks nobody for anything"
        assert said == []
        for figure in page.query_selector_all("figure svg"):
            box = figure.bounding_box()
            assert 0.5 * min(width, 640) <= box["width"] <= width
            # Text in a picture scales with it: at least 7 px on a phone.
            heights = figure.eval_on_selector_all(
                "text", "all => all.map(t => t.getBoundingClientRect().height)"
            )
            assert min(heights) >= 7
        browser.close()
