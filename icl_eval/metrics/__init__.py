"""Metrics, by the name that tasks give. Each maps the outcomes of a cell's queries to one value for each query."""

from icl_eval.metrics.classification import accuracy, bootstrap_interval

METRICS = {"accuracy": accuracy}

__all__ = ["METRICS", "accuracy", "bootstrap_interval"]
