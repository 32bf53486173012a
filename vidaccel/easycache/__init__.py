"""EasyCache (arXiv 2507.02860), the method whole: rule, predictors, where a call is, hook, report."""
