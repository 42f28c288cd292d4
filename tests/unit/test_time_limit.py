"""Code that runs for ever is ended; code that ends in time is not."""

import subprocess
import sys
import threading

import jinja2
import pytest

from cenacle.text.time_limit import LimitReached, time_limit

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("in_thread", [False, True])
def test_an_endless_template_is_ended(in_thread):
    caught = []

    def render():
        with pytest.raises(LimitReached), time_limit(0.2):
            jinja2.Environment().from_string(ENDLESS).render()
        caught.append(True)

    if in_thread:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    else:
        render()
    assert caught == [True]


def test_nothing_is_raised_in_time():
    with time_limit(600):
        text = jinja2.Environment().from_string("{{ 1 + 1 }}").render()
    assert text == "2"


CAUGHT = """
try:
    with time_limit(0.05):
        try:
            while True:
                pass
        except BaseException:
            pass
except LimitReached:
    pass
"""


@pytest.mark.parametrize("limited", ["with time_limit(600): pass", CAUGHT])
def test_nothing_is_left_to_be_raised(limited):
    """CPython 3.11 would look for it for ever once a debugger or hypothesis traces calls."""
    program = (
        "import sys\nfrom cenacle.text.time_limit import LimitReached, time_limit\n"
        f"{limited}\nsys.settrace(lambda *_: None)\n(lambda: print('goes on'))()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("goes on\n", 0), done.stderr
