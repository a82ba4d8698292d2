"""Goldens: what the code did on 2026-11-29, through doors that outlive any layout of its files.

One module an area, each with functions that return plain records; ``data/`` holds the records, `make` writes them
and ``tests/test_goldens.py`` compares. Nothing here imports anything of the package but ``codefend`` itself and the
function behind the ``codefend`` command.
"""
