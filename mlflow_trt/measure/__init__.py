"""How fast and how accurate: benchmarks, comparisons, layers, and what is installed here."""
