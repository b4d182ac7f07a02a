"""`python train.py --config FILE` is `python -m nested_attention.training --config FILE`.

ComfyUI's portable build has a Python that finds no modules in the folder where it runs.
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
runpy.run_module("nested_attention.training", run_name="__main__")
