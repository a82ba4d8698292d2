"""Frozen vision encoders and views of an image."""
