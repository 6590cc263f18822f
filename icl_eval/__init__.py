"""Few-shot evaluation: tasks as data, nested demonstrations, ranking with shared prefixes, controls, a report.

Reading order: tasks.py, sources.py, demonstrations.py, diagnostics.py, engine.py, metrics/, evaluation.py, run.py,
report.py.
"""

from icl_eval.evaluation import Results, evaluate, summary
from icl_eval.report import write_report
from icl_eval.tasks import Task, load_task

__all__ = ["Results", "Task", "evaluate", "load_task", "summary", "write_report"]
