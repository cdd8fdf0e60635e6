"""A task folder for lm-evaluation-harness: ``lm_eval --include_path`` this folder, ``--tasks longeval_lines``."""
