import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for exact_bed, whatever pytest's import mode
