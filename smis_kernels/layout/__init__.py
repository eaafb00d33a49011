"""Compiled label maps: windows, tables, and the choice of a path."""
