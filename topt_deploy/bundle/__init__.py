"""Sealed folders: what a bundle holds, how it is checked, and how it is signed."""
