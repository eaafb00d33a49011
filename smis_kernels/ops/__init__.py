"""The operations, a folder each: op.py (read first), reference.py, triton.py."""
