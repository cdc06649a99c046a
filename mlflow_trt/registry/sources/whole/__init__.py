"""Whole models as sources: find the network in one, see how it is called, and export it."""
