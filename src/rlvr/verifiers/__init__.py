"""Verifiers: from a prompt and a response to a verdict."""

from rlvr.tasks.letters import LettersVerifier
from rlvr.verifiers.integer import IntegerVerifier
from rlvr.verifiers.math import MathVerifier
from rlvr.verifiers.protocol import AsyncVerifier, Verifier, close_verifiers
from rlvr.verifiers.shaping import FormatVerifier, LengthVerifier, Weighted

__all__ = [
    "AsyncVerifier",
    "FormatVerifier",
    "IntegerVerifier",
    "LengthVerifier",
    "LettersVerifier",
    "MathVerifier",
    "Verifier",
    "Weighted",
    "close_verifiers",
]
