"""What all tests share: the scripts on the path, and mmsegmentation's numbers."""
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

MMSEG = torch.load(TESTS / "mmseg.pt", weights_only=True)  # what it holds and how: tests/README.md
