"""Where things are that tests read or run."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
"""The folder of modules and programs that tests share."""

ROOT = SUPPORT.parent.parent
