"""Metrics, by the name that tasks give.

`METRICS[name](predictions, targets)` gives one value for each query of a cell where there is one; `.score(…)` gives all
figures with 95 % intervals and says how they came about. "captions" is "cider" and METEOR, for which it runs Java.

Reading order: bootstrap.py, metric.py, paired.py, classification.py, tokenizer.py, captions.py, stems.py, vqa.py,
hallucination.py, kept.py.
"""

from icl_eval.metrics.bootstrap import bootstrap_interval, over_seeds
from icl_eval.metrics.captions import CAPTIONS, CIDER
from icl_eval.metrics.classification import ACCURACY, EXACT_MATCH, ROC_AUC, TOP_1, TOP_5
from icl_eval.metrics.hallucination import MME, POPE
from icl_eval.metrics.metric import Figure, Metric, Score
from icl_eval.metrics.vqa import OK_VQA_ACCURACY, VQA_ACCURACY, VQA_ACCURACY_OPEN_FLAMINGO

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        ACCURACY,
        TOP_1,
        TOP_5,
        EXACT_MATCH,
        ROC_AUC,
        CIDER,
        CAPTIONS,
        VQA_ACCURACY,
        VQA_ACCURACY_OPEN_FLAMINGO,
        OK_VQA_ACCURACY,
        POPE,
        MME,
    )
}

__all__ = ["METRICS", "Figure", "Metric", "Score", "bootstrap_interval", "over_seeds"]
