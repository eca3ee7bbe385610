"""Smaller models, and the report that compares before and after."""
