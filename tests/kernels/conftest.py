import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for kernel_cases, whatever pytest's import mode
