"""Adapters to other people's programs; each imports its own library when it is used."""
