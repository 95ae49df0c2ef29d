"""Entropy control for reinforcement learning with verifiable rewards (RLVR).

Importing the package is cheap on purpose: it pulls in neither torch, Lightning, Hydra, transformers nor vLLM.
Import the part you need, for instance ``from rlvr.clipping import ClipRange``. The layers are listed in the
README.
"""

from importlib.metadata import version

__version__ = version("rlvr")
