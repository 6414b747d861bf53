"""From a model to the fastest callable on this machine: :data:`deploy`.

``forms`` rewrites a network into others that compute the same, ``quantize`` into one that computes with eight bits,
``backends`` hands it to what runs it, ``machine`` knows what the hardware can do, and ``api`` measures and chooses. The
modules know layers and stages, and no family.
"""
from .api import Deployed, DeployError, Report, deploy

__all__ = ['DeployError', 'Deployed', 'Report', 'deploy']
