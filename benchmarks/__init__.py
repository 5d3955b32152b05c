"""How fast the encoder is and how much memory it takes, beside what one would use instead: `python -m benchmarks`.

`__main__.py` is the command line, `rows.py` says what is compared, `processes.py` starts the processes that measure.
In such a process, `workloads.py` answers: it builds one of `models.py` or `preprocessing.py`, and `operations.py`
counts what a model computes. `report.py` makes the tables and the chart. `stored_tokens.py` is a benchmark of its own.
"""
