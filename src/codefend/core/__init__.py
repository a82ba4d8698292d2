"""Shared parts that know no model: registry, settings, files, run folders, devices and images."""
