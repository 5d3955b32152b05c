"""How fast the encoder is and how much memory it takes, beside what one would use instead: `python -m benchmarks`.

`__main__.py` is the command line, `rows.py` what is measured and what it is measured by, `workers.py` the processes
that measure, `workloads.py` what runs in them, `operations.py` and `memory.py` what the arithmetic says, `report.py`
the tables and the chart.
"""
