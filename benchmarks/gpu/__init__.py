"""``python -m benchmarks.gpu``: everything that only a GPU can prove or measure, in one command.

The driver (:mod:`.driver`) runs each part (:mod:`.parts`) in a process of its own. A part appends
rows to its journal (:mod:`.journal`) as it goes, so a crash or a deadline costs one row, and
``--from`` goes on with the rows that are missing.
"""
