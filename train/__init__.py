"""torchrun entry points: pretraining, and the quickstart that runs everything; no library user imports this."""
