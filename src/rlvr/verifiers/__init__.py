"""Verifiers: from a prompt and a response to a verdict."""

from rlvr.tasks.letters import LettersVerifier
from rlvr.verifiers.integer import IntegerVerifier
from rlvr.verifiers.protocol import Verifier

__all__ = ["IntegerVerifier", "LettersVerifier", "Verifier"]
