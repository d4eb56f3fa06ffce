"""For the commands here when they are started by path: finds the package, and says so where this Python lacks it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed package comes first

from oryx_megatron import environment

environment.check()
