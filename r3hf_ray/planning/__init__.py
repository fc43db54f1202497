"""What a run needs of memory, links and nodes, known from configurations of models alone: no weight is read (floor 4).

Plans are made of shapes (`model_shapes`), added up by process (`processes`, `learner_memory`), and held to
measurements by `python -m tests.plan_check` (see docs/results.md).
"""
