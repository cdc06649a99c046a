"""Typed model and recipe in, plan out: the build process and what surrounds it."""
