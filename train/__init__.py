"""torchrun entry points: pretraining, and the quickstart that runs everything. Nothing here is imported by a library user."""
