"""A thin trainer: the papers' methods, measured with churn_kernels."""
