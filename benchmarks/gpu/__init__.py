"""``python -m benchmarks.gpu``: everything that only a GPU can prove or measure, in one command.

Each part (:mod:`.parts`) runs in a process of its own, which writes the results file after every
row (:mod:`.results`): a crash or a deadline costs one row, and ``--from`` goes on with the rows
that are missing. What is timed are cases of :mod:`smis_models.benchmark` (:mod:`.timed`).
"""
