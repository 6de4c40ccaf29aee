"""Text encoders that come as a graph: what is done around them is what is done around a decoder of text."""

from topt_deploy.prompts.families.text.host import CHAT, SETTINGS, make_host

__all__ = ["CHAT", "SETTINGS", "make_host"]
