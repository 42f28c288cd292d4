"""The bundled model answers questions it has never seen, many at once, on two nodes."""

from concurrent.futures import ThreadPoolExecutor

import cenacle
from cenacle.demo.run import DEMO_MODEL_DIR
from cenacle.demo.tasks import KINDS, held_out, is_correct


def test_at_least_95_percent_of_unseen_questions_are_answered():
    tasks = [task for kind in KINDS for task in held_out(kind, 15)]
    with cenacle.load(str(DEMO_MODEL_DIR), nodes=2) as model:

        def ask(task):
            return is_correct(task, "".join(c.text for c in model.stream(task.question, 80)))

        with ThreadPoolExecutor(32) as pool:
            right = list(pool.map(ask, tasks))
    assert len(tasks) >= 100
    assert sum(right) >= 0.95 * len(tasks)


def test_the_model_is_small_enough_to_ship():
    assert sum(f.stat().st_size for f in DEMO_MODEL_DIR.iterdir()) < 12_000_000
