"""Plumbing: of the method itself, only ppo.py (PPO's tensors) and arms.py (equal compute).

Imported first, it sets up the libraries before they start.
"""
import logging
import os
import warnings

# lengths that vary would fragment a full card; read when the import of bitsandbytes starts CUDA
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# their chatter, from the import on, hides our own lines
for _library in ("transformers", "bitsandbytes"):
    logging.getLogger(_library).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
