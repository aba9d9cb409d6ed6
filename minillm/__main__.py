"""`python -m minillm`, and what torchrun starts: `torchrun --nproc_per_node=2 -m minillm pretrain ...`."""

from minillm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
