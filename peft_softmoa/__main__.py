"""`python -m peft_softmoa` is the command `peft-softmoa`."""

from .cli import main

main()
