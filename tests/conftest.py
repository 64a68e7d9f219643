"""Puts the repository root on sys.path, so that the tests import the flat modules as the scripts do."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
