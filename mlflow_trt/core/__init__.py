"""Nouns and rules: types, settings, accuracy, selection, wire formats. Knows nothing of the rooms above."""
