"""`python -m effspinenet_lib` is the command `effspinenet` (for `torchrun -m`, for example)."""

from effspinenet_lib.cli import main

main()
