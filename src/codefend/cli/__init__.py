"""The ``codefend`` command line."""

from codefend.cli.app import app, main

__all__ = ["app", "main"]
