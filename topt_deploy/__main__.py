"""``python -m topt_deploy``: the command, where something else starts Python, as ``accelerate launch`` does."""

from .cli import main

main()
