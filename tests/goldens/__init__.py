"""Goldens: the results of the code of 2026-11-29, through interfaces that do not depend on the layout of its files.

One module an area, each with functions that return plain records; ``data/`` holds the records, `make` writes them
and ``tests/test_goldens.py`` compares. Nothing here imports anything of the package but ``codefend`` itself and the
function behind the ``codefend`` command.
"""
