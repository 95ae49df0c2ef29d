"""Verifiers: from a prompt and a response to a verdict."""

from rlvr.verifiers.integer import IntegerVerifier
from rlvr.verifiers.protocol import Verifier

__all__ = ["IntegerVerifier", "Verifier"]
