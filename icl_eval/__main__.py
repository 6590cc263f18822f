"""`python -m icl_eval …` is `flamingo-eval …`; so is `torchrun --nproc-per-node 2 -m icl_eval …`."""

from icl_eval.run import main

main()
