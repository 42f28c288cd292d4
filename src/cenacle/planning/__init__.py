"""The performance model: what a model will do on given machines, and what to buy.

Read `cost.py` first: it is the model. `catalog.py` and `shapes.py` give it facts, `routing.py`
counts experts, `planner.py` ranks schemes; `validate.py` holds it against measurements.
"""
