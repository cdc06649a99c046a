"""Registered versions in, registered versions out."""
