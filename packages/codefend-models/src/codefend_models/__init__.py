"""Weights, test sets and learned prompts of CoDefend, in the folders of the package codefend. It holds no code."""
