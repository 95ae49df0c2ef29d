"""Verifiers: from a prompt and a response to a verdict."""

from rlvr.verifiers.protocol import Verifier

__all__ = ["Verifier"]
