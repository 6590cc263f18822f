"""Few-shot evaluation: tasks as data, demonstrations that depend on nothing but the query, and what they contribute.

Reading order: tasks.py, datasets/, sources.py, demonstrations.py, features.py, prompts.py, diagnostics.py,
questions.py, engine.py, outcomes.py, metrics/, ledger.py, results.py, verdicts.py, evaluation.py, seeds.py, run.py,
listing.py, show.py, report.py; saved.py, compare.py, board.py; instructions.py, comparison.py.
"""

from icl_eval.evaluation import Results, evaluate, summary
from icl_eval.report import write_report
from icl_eval.tasks import Task, load_task

__all__ = ["Results", "Task", "evaluate", "load_task", "summary", "write_report"]
