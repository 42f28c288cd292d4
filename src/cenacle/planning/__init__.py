"""Predicting a model's speed and memory, and choosing a placement. Pure: no MLX, no sockets.

Read `perf_model.py` first. `catalog.py` and `model_shapes.py` give it facts, `routing_stats.py`
counts experts, `planner.py` compares schemes, `choose_plan.py` chooses a plan for given ranks.
"""
