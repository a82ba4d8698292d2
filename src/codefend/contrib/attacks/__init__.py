"""Attacks that few evaluations need."""
