"""The scripts lie one folder up. ppo_procgen comes before PyTorch, as it sets how long OpenMP's threads spin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_procgen  # noqa: F401
