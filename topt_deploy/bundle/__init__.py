"""Sealed folders: what a bundle holds, how it is checked, and how it is signed."""

SIGNATURE_VARIABLE = "TOPT_REQUIRE_SIGNATURE"
"""Environment variable: the public key that must have signed every bundle that is opened."""
