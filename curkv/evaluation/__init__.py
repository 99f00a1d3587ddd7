"""What eviction or pruning costs a model in quality: tasks, measures, tables and plots."""
