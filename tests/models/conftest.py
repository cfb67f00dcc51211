"""Lets the tests of this folder import what they share (golden_families), which pytest's importlib mode does not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
