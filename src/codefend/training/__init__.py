"""The training loops: one flat function each, resumable by the same command."""
